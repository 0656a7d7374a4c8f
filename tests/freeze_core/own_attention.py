"""Attention of one's own, which neither tables nor names know, and a model around it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, HEADS, DIM = 16, 4, 4


class Attention(nn.Module):
    """Causal attention; who derives says where q, k and v come from. `held` are edits by hand, `[batch, head, ...]`."""

    kv_heads = HEADS

    def __init__(self):
        super().__init__()
        self.n_heads = HEADS
        self.mix = nn.Linear(HEADS * DIM, WIDTH)
        self.held = {}
        self.build()

    def build(self):
        self.to_qkv = nn.Linear(WIDTH, (HEADS + 2 * self.kv_heads) * DIM)

    def split(self, x):
        raise NotImplementedError

    def finish(self, z, x):
        return self.mix(z)

    def forward(self, x):
        by_role = dict(zip("qkv", self.split(x), strict=True))  # each [batch, token, head, feature]
        for role, heads in self.held.items():
            by_role[role] = by_role[role].index_fill(2, torch.tensor(heads), 0)
        q, k, v = (by_role[role].transpose(1, 2) for role in "qkv")
        k, v = (one.repeat_interleave(HEADS // one.shape[1], dim=1) for one in (k, v))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.finish(z.transpose(1, 2).flatten(2), x)


class OddOrder(Attention):
    """All values, then all queries, then all keys."""

    def split(self, x):
        v, q, k = self.to_qkv(x).unflatten(-1, (3, HEADS, DIM)).unbind(2)
        return q, k, v


class Interleaved(Attention):
    """Per head its key, its value, its query; features of a head apart by the number of heads."""

    def split(self, x):
        k, v, q = self.to_qkv(x).unflatten(-1, (DIM, 3, HEADS)).permute(3, 0, 1, 4, 2)
        return q, k, v


class Grouped(Attention):
    """Separate projections under odd names, two KV heads."""

    kv_heads = 2

    def build(self):
        self.asks = nn.Linear(WIDTH, HEADS * DIM)
        self.offers, self.gives = (nn.Linear(WIDTH, self.kv_heads * DIM) for _ in range(2))

    def split(self, x):
        return [one(x).unflatten(-1, (-1, DIM)) for one in (self.asks, self.offers, self.gives)]


class GroupedByAttribute(Grouped):
    """The same, and the number of query heads that share is an attribute that its code reads."""

    num_key_value_groups = HEADS // 2

    def split(self, x):
        q, k, v = super().split(x)
        return q, *(one.repeat_interleave(self.num_key_value_groups, dim=2) for one in (k, v))


class GatesHeads(OddOrder):
    """Heads are gated by the hidden states before they are mixed."""

    def build(self):
        super().build()
        self.gate = nn.Linear(WIDTH, HEADS * DIM)

    def finish(self, z, x):
        return self.mix(z * self.gate(x).sigmoid())


class GatesAnswer(GatesHeads):
    """What the attention answers is gated, after its output projection: a linear layer that runs last."""

    def finish(self, z, x):
        return self.mix(z) * self.gate(x).sigmoid()


class Overlapping(Attention):
    """Queries and keys share half of their features."""

    def build(self):
        self.to_qkv = nn.Linear(WIDTH, 3 * HEADS * DIM)

    def split(self, x):
        one = self.to_qkv(x).unflatten(-1, (HEADS, 3 * DIM))
        return one[..., :DIM], one[..., 2 : DIM + 2], one[..., 2 * DIM :]


class OneForBoth(Attention):
    """Keys are values."""

    def split(self, x):
        q, k, _ = self.to_qkv(x).unflatten(-1, (3, HEADS, DIM)).unbind(2)
        return q, k, k


class AcrossHeads(OddOrder):
    """A norm over all heads lies between the projection and the heads."""

    def split(self, x):
        q, k, v = super().split(x)
        return F.rms_norm(q.flatten(2), (HEADS * DIM,)).view_as(q), k, v


class Convolved(OddOrder):
    """A convolution over tokens lies before the values."""

    def build(self):
        super().build()
        self.conv = nn.Conv1d(HEADS * DIM, HEADS * DIM, 1)

    def split(self, x):
        q, k, v = super().split(x)
        return q, k, self.conv(v.flatten(2).transpose(1, 2)).transpose(1, 2).view_as(v)


class Headless(OddOrder):
    """Does not say how many heads it has."""

    def __init__(self):
        super().__init__()
        del self.n_heads


class Layer(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention()
        self.drop = nn.Dropout(0.5)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        self.passes += 1
        return x + self.drop(self.attention(x))


class Model(nn.Module):
    def __init__(self, attention, dtype=torch.float32):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed = nn.Embedding(30, WIDTH)
            self.layers = nn.ModuleList(Layer(attention) for _ in range(2))
            for parameter in self.parameters():
                nn.init.normal_(parameter, std=0.5)
        self.to(dtype).eval()

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x
