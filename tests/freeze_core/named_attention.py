"""Attention with the usual names that reads its projections otherwise than the names say, put into a tiny LLaMA."""

from __future__ import annotations

import torch
from torch import nn

from pytest_circuitfreeze.models import tiny_model

HEADS, DIM = 4, 8


class Named(nn.Module):
    """Causal attention with LLaMA's projections; who derives says how they are read. `seen` is what the heads read.

    Rotary positions are left out, and the softmax is a function of torch that a judge can see.
    """

    def __init__(self, old):
        super().__init__()
        self.config = old.config
        self.layer_idx = old.layer_idx
        self.head_dim = DIM
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = old.q_proj, old.k_proj, old.v_proj, old.o_proj

    def heads(self, x):
        """A projection's output as `[batch, head, token, feature]`."""
        return x.unflatten(-1, (-1, DIM)).transpose(1, 2)

    def read(self, hidden):
        return [self.heads(projection(hidden)) for projection in (self.q_proj, self.k_proj, self.v_proj)]

    def repeat(self, x):
        return x.repeat_interleave(HEADS // x.shape[1], dim=1)

    def mix(self, z):
        """The output for z `[batch, head, token, feature]`."""
        return self.o_proj(z.transpose(1, 2).flatten(2))

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        q, k, v = self.read(hidden_states)
        k, v = self.repeat(k), self.repeat(v)
        self.seen = dict(zip("qkv", (q.detach(), k.detach(), v.detach()), strict=True))
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        tokens = scores.shape[-1]
        visible = torch.ones(tokens, tokens, dtype=torch.bool, device=scores.device).tril()
        if attention_mask is not None and attention_mask.dim() == 4:
            visible = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
        pattern = nn.functional.softmax(scores.masked_fill(~visible, torch.finfo(scores.dtype).min), dim=-1)
        return self.mix(pattern @ v), None


class Plain(Named):
    """As the names say."""


class Strided(Named):
    """Features are stored as `(d h)`: those of a head are apart."""

    def heads(self, x):
        return x.unflatten(-1, (DIM, -1)).permute(0, 3, 1, 2)


class StridedThroughout(Strided):
    """The output projection takes them so, too."""

    def mix(self, z):
        return self.o_proj(z.permute(0, 2, 3, 1).flatten(2))


class KeysAreValues(Named):
    """What is called keys is read as values, and the other way round."""

    def read(self, hidden):
        q, k, v = super().read(hidden)
        return q, v, k


class QueriesAreKeys(Named):
    """What is called queries is read as keys, and the other way round."""

    def read(self, hidden):
        q, k, v = super().read(hidden)
        return k, q, v


class Reversed(Named):
    """The last head's features come first, in queries alone: head h reads the values of another than itself."""

    def read(self, hidden):
        q, k, v = super().read(hidden)
        return q.flip(1), k, v


class Tiled(Named):
    """Query head h reads KV head h % 2."""

    def repeat(self, x):
        return x.repeat(1, HEADS // x.shape[1], 1, 1)


class SmallerHeads(Named):
    """It says that heads have 8 features, and they have 4."""

    def heads(self, x):
        return x.unflatten(-1, (-1, DIM // 2)).transpose(1, 2)

    def repeat(self, x):
        return x.repeat_interleave(2 * HEADS // x.shape[1], dim=1)


class LargerHeads(Named):
    """It says that heads have 8 features, and they have 16."""

    def heads(self, x):
        return x.unflatten(-1, (-1, 2 * DIM)).transpose(1, 2)

    def repeat(self, x):
        return x.repeat_interleave(HEADS // 2 // x.shape[1], dim=1)


class TokensFirst(Named):
    """Projects `[token, batch, feature]`."""

    def read(self, hidden):
        return [one.permute(2, 1, 0, 3) for one in super().read(hidden.transpose(0, 1))]

    def mix(self, z):
        return self.o_proj(z.permute(2, 0, 1, 3).flatten(2)).transpose(0, 1)


class NormsAll(Named):
    """A norm over all heads of the queries, under a name that says one of each head."""

    def __init__(self, old):
        super().__init__(old)
        self.q_norm = nn.RMSNorm(HEADS * DIM, elementwise_affine=False)

    def read(self, hidden):
        q, k, v = (projection(hidden) for projection in (self.q_proj, self.k_proj, self.v_proj))
        return [self.heads(one) for one in (self.q_norm(q), k, v)]


class NormsAllWithWeights(NormsAll):
    """The same with weights: what the norm gives is the activation."""

    def __init__(self, old):
        super().__init__(old)
        self.q_norm = nn.RMSNorm(HEADS * DIM)


class SaysGroups(Named):
    """Has the attribute that says how often to repeat, and does not read it."""

    def __init__(self, old):
        super().__init__(old)
        self.num_key_value_groups = HEADS // 2

    def repeat(self, x):
        return x[:, :2].repeat_interleave(2, dim=1)


class ReadsGroups(SaysGroups):
    """Reads it."""

    def repeat(self, x):
        return x.repeat_interleave(self.num_key_value_groups, dim=1)


class GPT2Attention(nn.Module):
    """Called as a class of the tables, with keys first."""

    order = "kqv"

    def __init__(self, old):
        super().__init__()
        self.config = old.config
        self.c_attn, self.c_proj, self.num_heads = old.c_attn, old.c_proj, HEADS

    def split(self, x):
        return dict(zip(self.order, x.unflatten(-1, (3, HEADS, DIM)).unbind(2), strict=True))

    def forward(self, hidden_states, past_key_values=None, attention_mask=None, *_, **__):
        parts = self.split(self.c_attn(hidden_states))
        q, k, v = (parts[role].transpose(1, 2) for role in "qkv")
        self.seen = dict(zip("qkv", (q.detach(), k.detach(), v.detach()), strict=True))
        scores = q @ k.transpose(2, 3) * DIM**-0.5
        tokens = scores.shape[-1]
        visible = torch.ones(tokens, tokens, dtype=torch.bool, device=scores.device).tril()
        if attention_mask is not None and attention_mask.dim() == 4:
            visible = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
        pattern = nn.functional.softmax(scores.masked_fill(~visible, torch.finfo(scores.dtype).min), dim=-1)
        return self.c_proj((pattern @ v).transpose(1, 2).flatten(2)), None


class ValuesFirst(GPT2Attention):
    order = "vkq"


class PerHead(GPT2Attention):
    """For each head its query, its key, its value."""

    def split(self, x):
        return dict(zip("qkv", x.unflatten(-1, (HEADS, 3, DIM)).unbind(3), strict=True))


def with_attention(attention, name="llama", **options):
    """A tiny model of a known type, whose attention is another one."""
    model = tiny_model(name, **options)
    for layer in model.transformer.h if name == "gpt2" else model.model.layers:
        where = "attn" if name == "gpt2" else "self_attn"
        own = attention(getattr(layer, where))
        setattr(layer, where, own.to(next(model.parameters()).dtype).eval())
    return model


def attention_of(model, layer=1):
    return model.transformer.h[layer].attn if hasattr(model, "transformer") else model.model.layers[layer].self_attn
