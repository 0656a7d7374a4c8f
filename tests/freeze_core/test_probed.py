"""Attention that neither tables nor names know: what probing finds is frozen as by hand, or refused by name."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from own_attention import (
    DIM,
    HEADS,
    WIDTH,
    AcrossHeads,
    Convolved,
    GatesAnswer,
    GatesHeads,
    Grouped,
    GroupedByAttribute,
    Headless,
    Interleaved,
    Layer,
    Model,
    OddOrder,
    OneForBoth,
    Overlapping,
)
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention

from freeze_core import AttentionCircuitFreezer, InterventionConfig, InterventionError, UnsupportedModelError
from pytest_circuitfreeze.models import tiny_model

FREEZER = AttentionCircuitFreezer()


@pytest.fixture
def ids():
    return torch.arange(14).view(2, 7) * 5 % 29


SERVED = [OddOrder, Interleaved, Grouped, GroupedByAttribute, GatesHeads, GatesAnswer]
CIRCUITS = {"qk": "qk", "ov": "v", "q": "q", "k": "k", "both": "qkv"}


@pytest.mark.parametrize("attention", SERVED)
@pytest.mark.parametrize("circuit", CIRCUITS)
@pytest.mark.parametrize("head", range(HEADS))
def test_a_freeze_is_the_edit_by_hand(attention, circuit, head, ids):
    model = Model(attention)
    by_hand = copy.deepcopy(model)
    held = by_hand.layers[1].attention
    own = head // (HEADS // attention.kv_heads) if attention is Grouped else head
    held.held = {role: [head if role == "q" else own] for role in CIRCUITS[circuit]}
    if attention is GroupedByAttribute:  # after it has repeated them: all heads of the group
        group = [head // 2 * 2, head // 2 * 2 + 1]
        held.held = {role: [head] if role == "q" else group for role in CIRCUITS[circuit]}
    with FREEZER.freeze_circuits(model, InterventionConfig([1], [head], circuit)), torch.no_grad():
        assert torch.equal(model(ids), by_hand(ids))


@pytest.mark.parametrize("head", range(HEADS))
def test_heads_of_a_group_get_their_own_where_an_attribute_lets_them(head, ids):
    model = Model(GroupedByAttribute)
    by_hand = copy.deepcopy(model)
    by_hand.layers[1].attention.held = {"v": [head]}
    with FREEZER.freeze_circuits(model, InterventionConfig([1], [head], "ov", kv_scope="head")), torch.no_grad():
        assert torch.equal(model(ids), by_hand(ids))
    with pytest.raises(UnsupportedModelError, match="cannot give query heads that share"):
        FREEZER.freeze_circuits(Model(Grouped), InterventionConfig([1], [head], "ov", kv_scope="head"))


@pytest.mark.parametrize("attention", SERVED)
def test_what_is_found_is_told(attention):
    found = FREEZER.get_model_config(Model(attention))
    assert (found["num_heads"], found["num_kv_heads"], found["head_dim"]) == (HEADS, attention.kv_heads, DIM)
    assert found["architecture"] == ("separate_qkv" if issubclass(attention, Grouped) else "fused_qkv")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_rounding_does_not_hide_a_layout(dtype, ids):
    model = Model(Interleaved, dtype)
    by_hand = copy.deepcopy(model)
    by_hand.layers[1].attention.held = {"v": [2]}
    with FREEZER.freeze_circuits(model, InterventionConfig([1], [2], "ov")), torch.no_grad():
        assert torch.equal(model(ids), by_hand(ids))


class CountsPairs(OddOrder):
    """Takes two heads for one."""

    def __init__(self):
        super().__init__()
        self.n_heads = HEADS // 2


class TokensFirst(Grouped):
    """Projects `[token, batch, feature]`."""

    def split(self, x):
        return tuple(one.transpose(0, 1) for one in super().split(x.transpose(0, 1)))


class Flattened(Grouped):
    """Projects `[batch * token, feature]`."""

    def split(self, x):
        return tuple(one.unflatten(0, x.shape[:2])[:, :, 0] for one in super().split(x.flatten(0, 1)[:, None]))


class Turned(OddOrder):
    """Is handed a matrix to multiply with, in the model's dtype."""

    def forward(self, x, turn):
        return super().forward(x @ turn)


class TurnedLayer(Layer):
    def forward(self, x):
        return x + self.attention(x, torch.eye(WIDTH, dtype=x.dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_attention_is_handed_is_of_the_dtype_that_it_is_probed_in(dtype):
    model = Model(Turned, dtype)
    for layer in model.layers:
        layer.__class__ = TurnedLayer
    FREEZER.freeze_circuits(model, InterventionConfig()).remove()


class TwoForQueries(OddOrder):
    """Queries are a sum of what two projections give."""

    def build(self):
        super().build()
        self.more = nn.Linear(WIDTH, HEADS * DIM)

    def split(self, x):
        q, k, v = super().split(x)
        return q + self.more(x).view_as(q), k, v


REFUSED = {
    TwoForQueries: "its q is made of features of more and to_qkv",
    CountsPairs: "says that it has 2 heads, and head 0 has parts with a query each",
    TokensFirst: r"gives \[2, 1, .*rows could not be told from tokens",
    Flattened: r"gives \[2, 1, .*rows could not be told from tokens",
    Overlapping: "its roles overlap",
    OneForBoth: "depends on no projection as its k",
    AcrossHeads: "not each has a query of its own.*apart by 1 of q",
    Convolved: "conv is a Conv1d, which may mix tokens",
    Headless: "does not say how many heads",
}


@pytest.mark.parametrize("attention", REFUSED)
def test_what_probing_does_not_tell_is_refused_by_name(attention):
    model = Model(attention)
    with pytest.raises(UnsupportedModelError, match=REFUSED[attention]) as error:
        FREEZER.freeze_circuits(model, InterventionConfig())
    assert f"layers.0.attention (and 1 more like it): neither names nor tables tell where {attention.__name__}" in str(
        error.value
    )
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_that_does_not_run_on_tokens_is_refused_by_name():
    layers = Model(type("New", (Turned,), {})).layers  # what they hand to their attention is not known
    with pytest.raises(UnsupportedModelError, match="does not run on two tokens alone"):
        FREEZER.freeze_circuits(nn.Sequential(layers), InterventionConfig())


def test_probing_leaves_the_model_and_the_generators_alone(ids):
    model = Model(OddOrder).train()
    model.layers[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    FREEZER.get_model_config(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert flags == [module.training for module in model.modules()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class KeepsMasks(OddOrder):
    """Makes a mask of the first tokens that it sees, and keeps it."""

    def build(self):
        super().build()
        self.register_buffer("seen", None)
        self.longest = 0

    def split(self, x):
        if self.seen is None:
            self.seen = torch.ones(x.shape[1], x.shape[1]).tril()
            self.extra = self.seen
        self.longest = max(self.longest, x.shape[1])
        return super().split(x)


def test_what_a_model_keeps_of_its_first_pass_is_not_of_the_probe(ids):
    model = Model(KeepsMasks)
    FREEZER.get_model_config(model)
    for layer in model.layers:
        assert layer.attention.seen is None
        assert layer.attention.longest == 0
        assert not hasattr(layer.attention, "extra")


def test_a_model_is_probed_once(monkeypatch, ids):
    model = Model(OddOrder)
    FREEZER.get_model_config(model)

    def refuse(self, input_ids):
        raise AssertionError("probed again")

    monkeypatch.setattr(Model, "forward", refuse)
    with FREEZER.freeze_circuits(model, InterventionConfig([0])):
        FREEZER.freeze_circuits(model, InterventionConfig([1])).remove()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_model_is_probed_without_gradients_about(mode, ids):
    with mode(), FREEZER.freeze_circuits(Model(OddOrder), InterventionConfig([1], [0])):
        pass


def test_a_stated_storage_that_probing_contradicts_is_refused():
    with pytest.raises(UnsupportedModelError, match="which is fused_qkv"):
        FREEZER.freeze_circuits(Model(OddOrder), InterventionConfig(), architecture="separate_qkv")
    FREEZER.freeze_circuits(Model(OddOrder), InterventionConfig(), architecture="fused_qkv").remove()


class FusedLlamaAttention(LlamaAttention):
    """LLaMA's own attention with one projection: keys, queries, values."""

    def fuse(self):
        projections = (self.k_proj, self.q_proj, self.v_proj)
        self.to_kqv = nn.Linear(self.q_proj.in_features, sum(one.out_features for one in projections), bias=False)
        self.to_kqv.weight = nn.Parameter(torch.cat([one.weight for one in projections]))
        self.sizes = [one.out_features for one in projections]
        for name in ("q_proj", "k_proj", "v_proj"):
            delattr(self, name)
        return self

    def forward(self, hidden_states, **kwargs):
        made = dict(zip("kqv", self.to_kqv(hidden_states).split(self.sizes, dim=-1), strict=True))
        # What LLaMA's code calls gives what was made already.
        self._modules.update({f"{role}_proj": nn.Identity() for role in made})
        try:
            for role, value in made.items():
                self._modules[f"{role}_proj"].forward = lambda _, value=value: value
            return super().forward(hidden_states, **kwargs)
        finally:
            for role in made:
                del self._modules[f"{role}_proj"]


@pytest.mark.parametrize("circuit", ["q", "k", "ov"])
@pytest.mark.parametrize("freeze_type", ["zero", "mean", "noise"])
def test_a_layer_of_a_known_model_with_attention_of_its_own(circuit, freeze_type, ids):
    """Rotary positions, masks and caches are what the model itself hands over; draws are those of the known storage."""
    model, known = (tiny_model("llama_gqa") for _ in range(2))
    own = model.model.layers[1].self_attn
    own.__class__ = FusedLlamaAttention
    own.fuse()
    mask = torch.tensor([[1] * 7, [0, 0] + [1] * 5])
    config = InterventionConfig([1, 2], [2], circuit, freeze_type)
    with torch.no_grad(), FREEZER.freeze_circuits(model, config), FREEZER.freeze_circuits(known, config):
        got, wanted = (one(ids, attention_mask=mask).logits for one in (model, known))
    # one float32 product of 32 features was cut otherwise
    torch.testing.assert_close(got, wanted, rtol=0, atol=32 * 2**-23 * float(wanted.abs().max()))


class Caching(Grouped):
    """Keeps keys and values in the cache that it is handed."""

    def forward(self, x, cache=None):
        q, k, v = (one.transpose(1, 2) for one in self.split(x))
        if isinstance(cache, transformers.DynamicCache):
            k, v = cache.update(k, v, 0)
        elif cache is not None:
            k, v = (torch.cat(pair, dim=2) for pair in zip(cache, (k, v), strict=True))
        scores = q @ k.repeat_interleave(2, dim=1).transpose(2, 3)
        seen = torch.ones(scores.shape[2:]).tril(scores.shape[3] - scores.shape[2]).bool()
        z = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.repeat_interleave(2, dim=1)
        return self.mix(z.transpose(1, 2).flatten(2)), (k, v)


class CachingModel(Model):
    def forward(self, input_ids, past_key_values=None):
        x, own = self.layers[0].attention(self.embed(input_ids), past_key_values)
        return SimpleNamespace(logits=x, past_key_values=own)


class UntoldModel(CachingModel):
    def forward(self, tokens, past_key_values=None):
        return super().forward(tokens, past_key_values)


NOISE = InterventionConfig([0], [1], "ov", "noise", noise_std=1.0)


@torch.no_grad()
def test_a_model_of_ones_own_with_a_cache(ids):
    model = CachingModel(Caching)
    with FREEZER.freeze_circuits(model, NOISE):
        cache = transformers.DynamicCache()
        whole = model(ids).logits
        model(ids[:, :4], cache)
        torch.testing.assert_close(model(ids[:, 4:], cache).logits, whole[:, 4:])
        with pytest.raises(InterventionError, match=r"was given past_key_values, a tuple of tensors.*DynamicCache"):
            model(ids[:, 4:], model(ids[:, :4]).past_key_values)


@torch.no_grad()
def test_columns_that_a_model_does_not_tell_are_an_error(ids):
    model = UntoldModel(Caching)
    with FREEZER.freeze_circuits(model, NOISE):
        cache = transformers.DynamicCache()
        model(ids[:, :4], cache)
        with pytest.raises(InterventionError, match="drawn for other columns"):
            model(ids[:, 4:], cache)


class Seeing(nn.Module):
    """A model whose eyes have attention of a kind that is known, and whose words have not."""

    def __init__(self):
        super().__init__()
        self.eyes = tiny_model("llama").model
        self.words = Model(OddOrder)

    def get_decoder(self):
        return self.words

    def forward(self, input_ids):
        return self.words(input_ids)


def test_the_decoder_is_what_the_model_says_it_is_known_or_not(ids):
    model = Seeing()
    with torch.no_grad(), FREEZER.freeze_circuits(model, InterventionConfig([1], [2], "ov")):
        assert FREEZER.record(model, ids)[1].v[:, :, 2].eq(0).all()
    model.get_decoder = lambda: model.eyes
    assert FREEZER.get_model_config(model)["num_layers"] == 3
