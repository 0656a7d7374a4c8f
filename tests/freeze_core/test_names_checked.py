"""What a name says of attention that is not transformers' own is checked by a probe before anything is frozen."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from types import MethodType

import pytest
import torch
import transformers
from named_attention import (
    HEADS,
    GPT2Attention,
    KeysAreValues,
    LargerHeads,
    Named,
    NormsAll,
    NormsAllWithWeights,
    PerHead,
    Plain,
    QueriesAreKeys,
    ReadsGroups,
    Reversed,
    SaysGroups,
    SmallerHeads,
    Strided,
    StridedThroughout,
    Tiled,
    TokensFirst,
    ValuesFirst,
    attention_of,
    with_attention,
)
from torch import nn
from transformers.integrations import sdpa_attention
from transformers.models.falcon.modeling_falcon import FalconAttention
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from freeze_core import AttentionCircuitFreezer, FreezeNotInForceError, InterventionConfig, UnsupportedModelError
from freeze_core.attention import probed
from freeze_core.attention.classes import runs_library_code
from freeze_core.attention.sites import find_sites
from freeze_core.attention.storages import reading_parts
from pytest_circuitfreeze.models import TINY, tiny_model

FREEZER = AttentionCircuitFreezer()
IDS = torch.arange(14).view(2, 7)

FOLLOWED = {
    Plain: "llama",
    Strided: "llama",
    KeysAreValues: "llama",
    QueriesAreKeys: "llama",
    Reversed: "llama",
    NormsAllWithWeights: "llama",
    GPT2Attention: "gpt2",
    ValuesFirst: "gpt2",
    PerHead: "gpt2",
}


@pytest.mark.parametrize("head", [0, 3])
@pytest.mark.parametrize(("circuit", "frozen"), {"q": "q", "k": "k", "ov": "v", "qk": "qk"}.items())
@pytest.mark.parametrize("attention", FOLLOWED)
def test_the_head_that_is_frozen_is_the_head_that_reads_it(attention, circuit, frozen, head):
    model = with_attention(attention, FOLLOWED[attention])
    with FREEZER.freeze_circuits(model, InterventionConfig([1], [head], circuit)), torch.no_grad():
        model(IDS, use_cache=False)
    for role, seen in attention_of(model).seen.items():
        read = seen.transpose(0, 1).flatten(1)
        assert read.eq(0).all(dim=1).tolist() == [role in frozen and other == head for other in range(HEADS)]
        assert read.eq(0).any(dim=1).tolist() == read.eq(0).all(dim=1).tolist()


@pytest.mark.parametrize("name", ["BloomAttention", "FalconAttention", "CodeGenAttention", "MptAttention"])
def test_a_class_name_of_the_tables_decides_nothing(name):
    model = with_attention(GPT2Attention, "gpt2")
    for block in model.transformer.h:
        block.attn.__class__ = type(name, (PerHead,), {})
        block.attn.query_key_value = block.attn.qkv_proj = block.attn.Wqkv = block.attn.c_attn
        block.attn.dense = block.attn.out_proj = block.attn.c_proj
    with FREEZER.freeze_circuits(model, InterventionConfig([1], [2], "k")), torch.no_grad():
        model(IDS, use_cache=False)
    seen = attention_of(model).seen
    assert [role for role in "qkv" if seen[role].eq(0).any()] == ["k"]
    assert seen["k"].eq(0).all(dim=(0, 2, 3)).tolist() == [False, False, True, False]


REFUSED = {
    Tiled: ("llama_gqa", "its heads share the features of its k otherwise than in groups"),
    StridedThroughout: ("llama", "values are not one stretch of what o_proj is given"),
    SmallerHeads: ("llama", "it says that it has 4 heads, and head 0 has parts with a query each"),
    LargerHeads: ("llama", "of its 4 heads not each has a query of its own"),
    TokensFirst: ("llama", r"gives \[2, 1, 32\] for one row of two tokens, where \[batch, token, feature\]"),
    NormsAll: ("llama", "of its 4 heads not each has a query of its own"),
}


@pytest.mark.parametrize("attention", REFUSED)
def test_what_names_say_wrongly_and_cannot_be_supported_is_refused_by_name(attention):
    name, reason = REFUSED[attention]
    model = with_attention(attention, name)
    for architecture in (None, "separate_qkv"):  # a probe that ran is believed more than what is stated
        with pytest.raises(UnsupportedModelError, match=reason) as error:
            FREEZER.freeze_circuits(model, InterventionConfig([1], [1], "ov"), architecture=architecture)
        said = f"{attention.__name__} runs code that is not transformers' own. Its names say 4 query and"
        assert said in str(error.value)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_stated_architecture_that_the_probe_contradicts_is_refused():
    model = with_attention(Strided)
    with pytest.raises(UnsupportedModelError, match="'fused_qkv' is contradicted by the layer, which is separate_qkv"):
        FREEZER.freeze_circuits(model, InterventionConfig(), architecture="fused_qkv")
    FREEZER.freeze_circuits(model, InterventionConfig(), architecture="separate_qkv").remove()


def test_single_query_heads_get_their_own_values_only_where_the_code_reads_the_attribute():
    config = InterventionConfig([1], [1], "ov", kv_scope="head")
    model = with_attention(ReadsGroups, "llama_gqa")
    with FREEZER.freeze_circuits(model, config), torch.no_grad():
        model(IDS, use_cache=False)
    assert attention_of(model).seen["v"].eq(0).all(dim=(0, 2, 3)).tolist() == [False, True, False, False]
    model = with_attention(SaysGroups, "llama_gqa")
    with pytest.raises(UnsupportedModelError, match="cannot give query heads that share"):
        FREEZER.freeze_circuits(model, config)
    FREEZER.freeze_circuits(model, InterventionConfig([1], [1], "ov")).remove()


def exchanging(own):
    """A forward of an attention that reads keys as values and values as keys."""

    def forward(self, *args, **kwargs):
        parts = self._modules
        parts["k_proj"], parts["v_proj"] = parts["v_proj"], parts["k_proj"]
        try:
            return own(self, *args, **kwargs)
        finally:
            parts["k_proj"], parts["v_proj"] = parts["v_proj"], parts["k_proj"]

    return forward


class Exchanging(LlamaAttention):
    forward = exchanging(LlamaAttention.forward)


def tiled(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """An attention function whose query head h reads KV head h % 2."""
    key, value = key.repeat(1, 2, 1, 1), value.repeat(1, 2, 1, 1)
    z = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return z.transpose(1, 2), None


def by_subclass(model, monkeypatch):
    for layer in model.model.layers:
        layer.self_attn.__class__ = Exchanging


def by_patched_class(model, monkeypatch):
    monkeypatch.setattr(LlamaAttention, "forward", exchanging(LlamaAttention.forward))


def by_decorated_class(model, monkeypatch):
    forward = exchanging(LlamaAttention.forward)
    monkeypatch.setattr(LlamaAttention, "forward", functools.wraps(LlamaAttention.forward)(forward))


def by_instance(model, monkeypatch):
    for layer in model.model.layers:
        layer.self_attn.forward = MethodType(exchanging(LlamaAttention.forward), layer.self_attn)


@pytest.mark.parametrize("patch", [by_subclass, by_patched_class, by_decorated_class, by_instance])
def test_code_that_somebody_put_into_a_known_class_is_probed(patch, monkeypatch):
    """Frozen values are those that are read as values, though another projection is called so."""
    model = tiny_model("llama_gqa")
    patch(model, monkeypatch)
    site = find_sites(model).by_layer[1]
    assert site.layout.shared.features["v"][0].module == "k_proj"
    assert site.layout.shared.features["k"][0].module == "v_proj"


def by_function(monkeypatch):
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", tiled)
    return tiny_model("llama_gqa", attn="eager")


def by_kernel(monkeypatch):
    registered = transformers.AttentionInterface._global_mapping
    monkeypatch.setitem(registered, "tiled", tiled)
    monkeypatch.setitem(transformers.AttentionMaskInterface._global_mapping, "tiled", lambda *args, **kwargs: None)
    return tiny_model("llama_gqa", attn="tiled")


def by_function_of_a_function(monkeypatch):
    """The attention function is transformers' own, and repeats heads by one that is not."""
    monkeypatch.setattr(modeling_llama, "repeat_kv", lambda x, groups: x.repeat(1, groups, 1, 1))
    return tiny_model("llama_gqa", attn="eager")


def by_function_of_a_kernel(monkeypatch):
    monkeypatch.setattr(sdpa_attention, "repeat_kv", lambda x, groups: x.repeat(1, groups, 1, 1))
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", lambda *_: False)
    return tiny_model("llama_gqa", attn="sdpa")


@pytest.mark.parametrize("patch", [by_function, by_function_of_a_function, by_kernel, by_function_of_a_kernel])
def test_an_attention_function_that_reads_other_heads_is_refused(patch, monkeypatch):
    model = patch(monkeypatch)
    with pytest.raises(UnsupportedModelError, match="share the features of its k otherwise than in groups"):
        FREEZER.freeze_circuits(model, InterventionConfig([1], [1], "ov"))


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_a_function_that_is_replaced_after_a_probe_is_probed_again(kernel, monkeypatch):
    file = modeling_llama if kernel == "eager" else sdpa_attention
    own = file.repeat_kv
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", lambda *_: False)
    monkeypatch.setattr(file, "repeat_kv", lambda x, groups: own(x, groups))
    with FREEZER.freeze_circuits(tiny_model("llama_gqa", attn=kernel), InterventionConfig([1], [1], "ov")):
        pass
    monkeypatch.setattr(file, "repeat_kv", lambda x, groups: x.repeat(1, groups, 1, 1))
    with pytest.raises(UnsupportedModelError, match="share the features of its k otherwise than in groups"):
        FREEZER.freeze_circuits(tiny_model("llama_gqa", attn=kernel), InterventionConfig([1], [1], "ov"))


class NormOfAll(nn.Module):
    """In the place of Qwen3's norm of each head: it norms over all of them."""

    weight = None

    def forward(self, x):
        return nn.functional.rms_norm(x, x.shape[-2:])


def test_a_part_that_somebody_replaced_is_probed():
    model = tiny_model("qwen3")
    for layer in model.model.layers:
        assert type(layer.self_attn) is Qwen3Attention
        layer.self_attn.q_norm = NormOfAll()
    with pytest.raises(UnsupportedModelError, match="not each has a query of its own"):
        FREEZER.freeze_circuits(model, InterventionConfig([1], [1], "q"))


@pytest.mark.parametrize("name", [name for name in TINY if name != "qwen"])
def test_transformers_own_attention_is_not_probed(name, monkeypatch):
    monkeypatch.setattr(probed, "probe", lambda *args, **kwargs: pytest.fail("probed"))
    model = tiny_model(name)
    for site in find_sites(model).by_layer.values():
        assert all(runs_library_code(part, {}) for part in reading_parts(site.attention))


def test_remote_code_of_a_known_family_is_confirmed_by_the_probe():
    site = find_sites(tiny_model("qwen")).by_layer[1]
    assert not runs_library_code(site.attention, {})
    assert {role: parts[0].features[0, 0].item() for role, parts in site.layout.shared.features.items()} == {
        "q": 0,
        "k": 32,
        "v": 64,
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", [Strided, ReadsGroups, GPT2Attention])
def test_names_are_checked_in_any_dtype(attention, dtype):
    name = {Strided: "llama", ReadsGroups: "llama_gqa", GPT2Attention: "gpt2"}[attention]
    model = with_attention(attention, name, dtype=dtype)
    config = InterventionConfig([1], [1], "ov", kv_scope="head")
    with FREEZER.freeze_circuits(model, config), torch.no_grad():
        model(IDS, use_cache=False)
    assert attention_of(model).seen["v"].eq(0).all(dim=(0, 2, 3)).tolist() == [False, True, False, False]


def test_weights_of_zero_and_large_ones_hide_nothing():
    for scale in (0.0, 1e4):
        model = with_attention(Strided)
        with torch.no_grad():
            for layer in model.model.layers:
                for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                    projection.weight.mul_(scale)
        probed._OF_CLASS.pop(Strided, None)
        assert FREEZER.get_model_config(model)["num_heads"] == HEADS


def test_a_class_is_probed_once_for_a_config(monkeypatch):
    probed._OF_CLASS.pop(Strided, None)
    runs = []
    own = probed.probe
    monkeypatch.setattr(probed, "probe", lambda *args, **kwargs: runs.append(1) or own(*args, **kwargs))
    first = with_attention(Strided)
    FREEZER.get_model_config(first)
    once = len(runs)
    assert once > 0
    FREEZER.get_model_config(first)
    FREEZER.get_model_config(with_attention(Strided))
    assert len(runs) == once
    FREEZER.get_model_config(with_attention(Strided, "llama_gqa"))  # other head counts
    assert len(runs) > once


def test_code_that_changed_is_probed_anew(monkeypatch):
    model = with_attention(Plain, "llama_gqa")
    FREEZER.freeze_circuits(model, InterventionConfig([1], [1], "ov")).remove()
    monkeypatch.setattr(Plain, "repeat", Tiled.repeat)
    with pytest.raises(UnsupportedModelError, match="otherwise than in groups"):
        FREEZER.freeze_circuits(model, InterventionConfig([1], [1], "ov"))
    monkeypatch.undo()
    FREEZER.freeze_circuits(model, InterventionConfig([1], [1], "ov")).remove()
    attention_of(model).repeat = MethodType(Tiled.repeat, attention_of(model))
    with pytest.raises(UnsupportedModelError, match="otherwise than in groups"):
        FREEZER.freeze_circuits(model, InterventionConfig([1], [1], "ov"))


class Ordered(Named):
    """The order of its roles is an attribute of the instance."""

    order = "qkv"

    def read(self, hidden):
        by_role = dict(zip(self.order, super().read(hidden), strict=True))
        return [by_role[role] for role in "qkv"]


def test_modules_of_one_class_with_other_attributes_are_probed_apart():
    for order in ("qkv", "qvk", "kqv"):
        model = with_attention(Ordered)
        for layer in model.model.layers:
            layer.self_attn.order = order
        features = find_sites(model).by_layer[1].layout.shared.features
        assert [features[role][0].module[0] for role in "qkv"] == [f"{'qkv'[order.index(role)]}" for role in "qkv"]


def test_a_module_whose_attributes_changed_is_probed_anew(monkeypatch):
    """Its own, or those of its class."""

    def values_module():
        return find_sites(model).by_layer[1].layout.shared.features["v"][0].module

    model = with_attention(Ordered)
    assert values_module() == "v_proj"
    for layer in model.model.layers:
        layer.self_attn.order = "qvk"
    assert values_module() == "k_proj"
    for layer in model.model.layers:
        del layer.self_attn.order
    assert values_module() == "v_proj"
    monkeypatch.setattr(Ordered, "order", "qvk")
    assert values_module() == "k_proj"


def test_a_probe_leaves_no_trace():
    probed._OF_CLASS.pop(Strided, None)
    model = with_attention(Strided).train()
    seen = []
    for module in model.modules():
        module.register_forward_hook(lambda *args: seen.append(1))
        module.register_forward_pre_hook(lambda *args: seen.append(1))
    before = [dict(vars(module)) for module in model.modules()]
    weights = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    FREEZER.get_model_config(model)
    assert not seen
    assert torch.equal(torch.get_rng_state(), state)
    assert before == [vars(module) for module in model.modules()]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_was_found_keeps_no_model_alive():
    model = with_attention(type("Short", (Strided,), {}))
    attention_of(model).repeat = MethodType(Strided.repeat, attention_of(model))
    FREEZER.get_model_config(model)
    gone = weakref.ref(model), weakref.ref(attention_of(model))
    del model
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_a_wrapper_around_an_attentions_forward_is_no_obstacle():
    model, plain = tiny_model("llama_gqa"), tiny_model("llama_gqa")
    calls = []
    for layer in model.model.layers:
        own = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, own=own, **kwargs: (calls.append(1), own(*args, **kwargs))[1]
    config = InterventionConfig([1], [1], "both", kv_scope="head")
    with torch.no_grad(), FREEZER.freeze_circuits(model, config), FREEZER.freeze_circuits(plain, config):
        assert torch.equal(model(IDS).logits, plain(IDS).logits)


@pytest.mark.parametrize("cls", [LlamaAttention, FalconAttention])
def test_a_subclass_that_changes_nothing_is_served_as_its_class(cls):
    name = {LlamaAttention: "llama_gqa", FalconAttention: "falcon_gqa"}[cls]
    model, plain = tiny_model(name), tiny_model(name)
    same = type("Same", (cls,), {})
    for module in model.modules():
        if type(module) is cls:
            module.__class__ = same
    config = InterventionConfig([1], [1], "both", "mean", kv_scope="head")
    with torch.no_grad(), FREEZER.freeze_circuits(model, config), FREEZER.freeze_circuits(plain, config):
        assert torch.equal(model(IDS).logits, plain(IDS).logits)


def test_a_model_without_values_is_refused_unless_its_class_was_probed_or_the_storage_is_stated():
    class OnMeta(Strided):
        pass

    config = copy.deepcopy(tiny_model("llama").config)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).eval()
        for layer in model.model.layers:
            layer.self_attn = OnMeta(layer.self_attn)
    with pytest.raises(UnsupportedModelError, match=r"cannot be verified: .* on the meta device.*architecture="):
        FREEZER.freeze_circuits(model, InterventionConfig())
    FREEZER.freeze_circuits(model, InterventionConfig(), architecture="separate_qkv").remove()


MODES = ["stopgrad", "ste", "circuit_ste"]


class ByClass(modeling_llama.LlamaDecoderLayer):
    """Calls its attention by the attention's class."""

    def attend(self, hidden_states, **kwargs):
        return type(self.self_attn).forward(self.self_attn, hidden_states, **kwargs)

    def forward(self, hidden_states, **kwargs):
        mixed, _ = self.attend(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class ByCapturedMethod(ByClass):
    """Calls a bound method that it took before the freeze."""

    def attend(self, hidden_states, **kwargs):
        return self.captured(hidden_states, **kwargs)


class ByBaseClass(ByClass):
    def attend(self, hidden_states, **kwargs):
        return LlamaAttention.forward(self.self_attn, hidden_states, **kwargs)


class ByCheckpoint(ByClass):
    def attend(self, hidden_states, **kwargs):
        run = torch.utils.checkpoint.checkpoint
        return run(LlamaAttention.forward, self.self_attn, hidden_states, use_reentrant=False, **kwargs)


class ByItsForward(ByClass):
    """Calls the module's forward, which is what a freeze replaces."""

    def attend(self, hidden_states, **kwargs):
        return self.self_attn.forward(hidden_states, **kwargs)


class ByItsClassesCall(ByClass):
    def attend(self, hidden_states, **kwargs):
        return type(self.self_attn).__call__(self.self_attn, hidden_states, **kwargs)


def frozen_gradient(mode, layer=None, **fields):
    model = tiny_model("llama_gqa")
    for one in model.model.layers if layer else ():
        one.__class__ = layer
        one.captured = one.self_attn.forward
    config = InterventionConfig([1], [0], "ov", backward_mode=mode, **fields)
    with FREEZER.freeze_circuits(model, config):
        model(IDS, use_cache=False).logits.square().mean().backward()
    return model.model.layers[1].self_attn.v_proj.weight.grad


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "layer", [ByClass, ByBaseClass, ByCapturedMethod, ByCheckpoint, ByItsForward, ByItsClassesCall]
)
def test_an_attention_that_is_not_called_as_a_module_has_the_gradient_that_was_asked_for_or_raises(layer, mode):
    if mode == "circuit_ste" and layer not in (ByItsForward, ByItsClassesCall):
        with pytest.raises(FreezeNotInForceError, match="ran outside of its module's own call"):
            frozen_gradient(mode, layer)
    else:
        torch.testing.assert_close(frozen_gradient(mode, layer), frozen_gradient(mode), rtol=0, atol=0)


def test_an_attention_that_is_called_by_its_class_is_frozen_where_no_gradient_is_asked_for():
    model, plain = tiny_model("llama_gqa"), tiny_model("llama_gqa")
    for layer in model.model.layers:
        layer.__class__ = ByClass
    recording = FREEZER.record(plain, IDS + 1)
    for fields in ({"backward_mode": "circuit_ste"}, {"freeze_type": "reference", "reference": recording}):
        config = InterventionConfig([1], [0], "both", **fields)
        with torch.no_grad(), FREEZER.freeze_circuits(model, config), FREEZER.freeze_circuits(plain, config):
            assert torch.equal(model(IDS, use_cache=False).logits, plain(IDS, use_cache=False).logits)
