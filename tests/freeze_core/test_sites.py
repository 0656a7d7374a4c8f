"""What is found in a model, and what is refused with its reason."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

from freeze_core import (
    AttentionCircuitFreezer,
    InterventionConfig,
    InterventionError,
    ModelArchitecture,
    UnsupportedModelError,
)
from freeze_core.attention.sites import find_sites
from freeze_core.attention.storages import layout_of
from pytest_circuitfreeze.models import tiny_model
from pytest_circuitfreeze.shrinking import tiny_of_type

FREEZER = AttentionCircuitFreezer()

EXPECTED = {
    "gpt2": ("fused_qkv", 4, "MHA"),
    "opt": ("separate_qkv", 4, "MHA"),
    "llama": ("separate_qkv", 4, "MHA"),
    "llama_gqa": ("separate_qkv", 2, "GQA"),
    "mistral_gqa": ("separate_qkv", 2, "GQA"),
    "phi3": ("fused_qkv", 2, "GQA"),
    "falcon_mqa": ("fused_qkv", 1, "MQA"),
    "falcon_mha": ("fused_qkv", 4, "MHA"),
    "falcon_gqa": ("fused_qkv", 2, "GQA"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_storage_and_head_counts_are_found(name):
    architecture, kv_heads, kind = EXPECTED[name]
    found = FREEZER.get_model_config(tiny_model(name))
    assert found.pop("layers").keys() == {0, 1, 2}
    assert found == {
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": kv_heads,
        "head_dim": 8,
        "architecture": architecture,
        "attention_type": kind,
    }
    assert FREEZER.detect_architecture(tiny_model(name)) is ModelArchitecture(architecture)


def test_latent_attention_is_of_separate_projections():
    found = FREEZER.get_model_config(tiny_model("deepseek_v3"))
    assert (found["architecture"], found["attention_type"]) == ("separate_qkv", "MHA")
    site = find_sites(tiny_model("deepseek_v3")).by_layer[0]
    attention = site.attention
    assert found["head_dim"] == attention.qk_head_dim == site.layout.features("q") == site.layout.features("k")
    assert site.layout.features("v") == site.layout.features("z") == attention.v_head_dim


def test_what_is_found_does_not_change_while_frozen():
    for name in ("falcon_mqa", "mistral_gqa"):
        model = tiny_model(name)
        before = FREEZER.get_model_config(model)
        with FREEZER.freeze_circuits(model, InterventionConfig(head_indices=[1], kv_scope="head")):
            assert FREEZER.get_model_config(model) == before


def test_the_base_model_alone_is_served(ids):
    model = tiny_model("llama")
    with FREEZER.freeze_circuits(model.model, InterventionConfig(freeze_type="mean")):
        frozen = model(ids).logits
    assert not torch.equal(frozen, model(ids).logits)


def test_a_norm_over_all_heads_is_where_the_activation_is(ids):
    config = transformers.Olmo2Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, eos_token_id=0
    )
    model = transformers.Olmo2ForCausalLM(config).eval()
    attention = model.model.layers[0].self_attn
    for role in "qk":
        with FREEZER.freeze_circuits(model, InterventionConfig([0], [1], role)):
            assert "forward" in vars(attention.get_submodule(f"{role}_norm"))
            assert "forward" not in vars(attention.get_submodule(f"{role}_proj"))


@pytest.mark.parametrize("role", "qkv")
def test_a_norm_of_each_head_comes_after_the_activation(role):
    attention = plain()
    for size, holds in ((8, "norm"), (4, "proj")):
        setattr(attention, f"{role}_norm", nn.RMSNorm(size))
        with FREEZER.freeze_circuits(Layered(attention), InterventionConfig(circuit=role)):
            frozen = [name for name, module in attention.named_modules() if name and "forward" in vars(module)]
        assert frozen == [f"{role}_{holds}"]


class Bare(nn.Module):
    """No attention at all."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4)])


class Gated(nn.Module):
    """Attention with the usual names, and something unknown between its projections and the heads."""

    head_dim = 4

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))
        self.k_conv1d = nn.Conv1d(8, 8, 1)

    def forward(self, x):
        q, k, v = (self.heads(role, x) for role in "qkv")
        k, v = (one.repeat_interleave(2 // one.shape[1], dim=1) for one in (k, v))
        z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(z.transpose(1, 2).flatten(2))

    def heads(self, role, x):
        """A projection's output `[batch, head, token, feature]`, normed over all heads or each."""
        features, norm = getattr(self, f"{role}_proj")(x), getattr(self, f"{role}_norm", nn.Identity())
        over_all = getattr(norm, "normalized_shape", (4,)) == (8,)
        features = norm(features).unflatten(-1, (-1, 4)) if over_all else norm(features.unflatten(-1, (-1, 4)))
        return features.transpose(1, 2)


class Layered(nn.Module):
    """A stack of layers around one attention module."""

    def __init__(self, attention):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"self_attn": attention})])


class HiddenKernel(nn.Module):
    """Attention whose projections are not modules."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.MultiheadAttention(8, 2)])


def refusal(model, **kwargs):
    with pytest.raises(UnsupportedModelError) as error:
        FREEZER.freeze_circuits(model, InterventionConfig(), **kwargs)
    return str(error.value)


def test_a_model_without_attention_is_refused():
    assert "Bare has no attention layer" in refusal(Bare())
    assert "ModuleList has no attention layer" in refusal(Layered(plain()).layers)  # nothing would run it
    with pytest.raises(UnsupportedModelError, match="no attention"):
        FREEZER.detect_architecture(Bare())


def test_what_is_no_model_is_refused():
    assert "model is a str" in refusal("gpt2")


def test_unknown_parts_are_refused_unless_the_storage_is_stated_by_hand():
    model = Layered(Gated())
    assert "k_conv1d" in refusal(model)
    assert "more like it" not in refusal(model)
    FREEZER.freeze_circuits(model, InterventionConfig(), architecture="separate_qkv").remove()


def test_a_stated_storage_that_the_model_contradicts_is_refused():
    assert "is fused_qkv" in refusal(tiny_model("gpt2"), architecture="separate_qkv")
    assert "is separate_qkv" in refusal(tiny_model("llama"), architecture=ModelArchitecture.FUSED_QKV)
    assert "exposes no projection" in refusal(tiny_model("llama"), architecture="flash_attention")
    with pytest.raises(InterventionError, match="architecture='conv'"):
        FREEZER.freeze_circuits(tiny_model("llama"), InterventionConfig(), architecture="conv")


def test_hidden_projections_are_detected_as_such():
    assert FREEZER.detect_architecture(HiddenKernel()) is ModelArchitecture.FLASH_ATTENTION
    assert "no attention layer with projections" in refusal(HiddenKernel())


def test_attention_that_runs_no_projection_hides_them():
    attention = type("RawAttention", (nn.Module,), {})()
    attention.drop = nn.Dropout()
    assert FREEZER.detect_architecture(Layered(attention)) is ModelArchitecture.FLASH_ATTENTION
    attention.mix = nn.Linear(4, 4)
    with pytest.raises(UnsupportedModelError, match="no attention layer"):
        FREEZER.detect_architecture(Layered(attention))


def test_a_scripted_or_replicated_model_is_refused():
    assert "DataParallel" in refusal(nn.DataParallel(tiny_model("gpt2")))


def test_of_an_encoder_and_a_decoder_the_decoders_own_attention_is_frozen():
    config = transformers.BartConfig(
        vocab_size=97,
        d_model=16,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
    )
    model = transformers.BartForConditionalGeneration(config).eval()
    with FREEZER.freeze_circuits(model, InterventionConfig([1])):
        frozen = [name for name, module in model.named_modules() if "forward" in vars(module) and "proj" in name]
    assert frozen == [f"model.decoder.layers.1.self_attn.{role}_proj" for role in "kvq"]


def test_stacks_that_no_decoder_tells_apart_are_refused():
    twin = nn.ModuleDict({"left": Layered(plain()), "right": Layered(plain())})
    assert "left.layers, right.layers, and does not say which is its decoder" in refusal(twin)


def test_a_module_that_serves_two_layers_is_refused():
    shared = plain()
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"self_attn": shared}) for _ in range(2)])})
    assert "serves v_proj of layer 0 and v_proj of layer 1" in refusal(model)


def plain():
    attention = Gated()
    del attention.k_conv1d
    return attention


def test_an_output_gate_inside_the_query_projection_is_refused():
    class WideQuery(Gated):
        def __init__(self):
            super().__init__()
            del self.k_conv1d
            self.q_proj = nn.Linear(8, 16)

    with pytest.raises(UnsupportedModelError, match="q_proj holds more than queries"):
        layout_of(WideQuery(), None)


def test_attention_without_an_output_projection_is_refused():
    attention = plain()
    del attention.o_proj
    with pytest.raises(UnsupportedModelError, match="no output projection: it has none of attn_sub_norm, o_proj"):
        layout_of(attention, None)
    assert "by its names: no output projection" in refusal(Layered(attention))


def test_a_size_of_heads_that_is_none_is_refused():
    attention = plain()
    attention.head_dim = 0
    assert "does not say how large a head is" in refusal(Layered(attention))
    assert "does not say how many heads it has" in refusal(Layered(attention))


def test_readers_that_are_of_no_kind_read_the_same_layer():
    model = tiny_model("gemma3n_text")
    attentions = [layer.self_attn for layer in model.model.layers]
    for attention in attentions:
        del attention.layer_type
    with FREEZER.freeze_circuits(model, InterventionConfig([0], [1], "v", kv_scope="head")):
        assert attentions[2].num_key_value_groups == 1
    assert attentions[2].num_key_value_groups == 2


def test_an_unshared_view_that_the_attention_cannot_take_is_refused_before_anything_is_installed():
    class NoGroups(Gated):
        def __init__(self):
            super().__init__()
            del self.k_conv1d
            self.k_proj, self.v_proj = nn.Linear(8, 4), nn.Linear(8, 4)

    model = Layered(NoGroups())
    with pytest.raises(UnsupportedModelError, match="cannot give query heads"):
        FREEZER.freeze_circuits(model, InterventionConfig(head_indices=[0], kv_scope="head"))
    assert "forward" not in vars(model.layers[0]["self_attn"])


@pytest.mark.parametrize("role", ["k", "v"])
def test_later_layers_read_the_unshared_heads_of_the_layer_that_stored_them(role, ids):
    """Gemma 3n: layer 2 reads the keys and values of layer 0; under `head` each of its heads reads its own copy."""
    model = tiny_model("gemma3n_text")
    reader, calls, zs = model.model.layers[2].self_attn, [], []

    def keep(module, args, kwargs):
        calls.append((args, {**kwargs, "shared_kv_states": dict(kwargs["shared_kv_states"])}))

    def keep_z(module, args):
        zs.append(args[0].unflatten(-1, (4, 8)))

    hooks = [
        reader.register_forward_pre_hook(keep, with_kwargs=True),
        reader.o_proj.register_forward_pre_hook(keep_z),
    ]
    config = InterventionConfig([0], [1], role, kv_scope="head")
    with torch.no_grad(), FREEZER.freeze_circuits(model, config):
        assert reader.num_key_value_groups == 1
        model(ids, use_cache=False)
    assert reader.num_key_value_groups == 2
    args, kwargs = calls.pop()
    states = {
        kind: tuple(one[:, ::2] for one in both)
        for kind, both in kwargs["shared_kv_states"].items()
        if both[0].shape[1] == 4
    }
    with torch.no_grad():
        reader(*args, **{**kwargs, "shared_kv_states": kwargs["shared_kv_states"] | states})
    for hook in hooks:
        hook.remove()
    moved = (zs[1] - zs[0]).abs().amax((0, 1, 3)) > 1e-5
    assert moved.tolist() == [False, True, False, False]


HYBRIDS = ("qwen3_next", "jamba", "minimax", "olmo_hybrid", "kimi_linear", "recurrent_gemma", "nemotron_h", "lfm2")


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_an_index_to_a_layer_without_attention_says_so(model_type):
    model = tiny_of_type(model_type, attn=None)
    found = FREEZER.get_model_config(model)
    without = next(layer for layer in range(found["num_layers"]) if layer not in found["layers"])
    with pytest.raises(InterventionError, match=rf"layer {without} has no self attention; those that have: \["):
        FREEZER.freeze_circuits(model, InterventionConfig([without]))
    FREEZER.freeze_circuits(model, InterventionConfig()).remove()


REASONS = {
    "deepseek_v4": "its keys and its values are the same features",
    "inkling2_text": "a convolution over tokens",
    "jetmoe": "its queries are routed to experts",
    "longcat_flash": "the layer has another attention",
    "mamba2": r"mix tokens by a recurrence \(Mamba2Mixer\)",
    "prophetnet": "its predicting streams share one pass",
    "reformer": "its layers are reversible",
    "xlnet": "its projections are parameters",
    "xlstm": r"mix tokens by a recurrence \(xLSTMLayer\)",
    "zaya": "a convolution over tokens",
}


@pytest.mark.parametrize("model_type", REASONS)
def test_what_cannot_be_served_is_refused_for_its_own_reason(model_type):
    model = tiny_of_type(model_type, attn=None)
    with pytest.raises(UnsupportedModelError, match=REASONS[model_type]):
        FREEZER.freeze_circuits(model, InterventionConfig())
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("more", [1, 2])
def test_a_layer_with_several_attentions_is_refused(more):
    model = tiny_model("llama")
    for number in range(more):
        model.model.layers[1].add_module(f"attention_{number}", copy.deepcopy(model.model.layers[1].self_attn))
    with pytest.raises(UnsupportedModelError, match="the layer has another attention"):
        FREEZER.freeze_circuits(model, InterventionConfig([1]))


def test_projections_that_give_tokens_before_rows_are_refused():
    sizes = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    config = transformers.FSMTConfig(
        langs=["en", "de"],
        src_vocab_size=20,
        tgt_vocab_size=20,
        d_model=16,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=32,
        **sizes,
    )
    model = transformers.FSMTForConditionalGeneration(config)
    for attention in ("self", "cross", "encoder"):
        with pytest.raises(UnsupportedModelError, match=r"give \[token, batch, feature\]"):
            FREEZER.freeze_circuits(model, InterventionConfig(attention=attention))


def test_attention_to_two_sides_by_the_same_projections_is_refused():
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.__class__ = type("T5Gemma2MergedAttention", (type(layer.self_attn),), {})
    reason = (
        "T5Gemma2MergedAttention cannot be served: its keys and its values are of the decoder's tokens and of the enc"
    )
    with pytest.raises(UnsupportedModelError, match=rf"^model\.layers\.0\.self_attn \(and 2 more like it\): {reason}"):
        FREEZER.freeze_circuits(model, InterventionConfig())
