"""Freezes in a running model: what they hold, how they meet, and that nothing is left behind."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from freeze_core import (
    AttentionCircuitFreezer,
    CircuitFreezeError,
    FreezeNotInForceError,
    InterventionConfig,
    InterventionError,
    freeze_ov_circuit,
    freeze_qk_circuit,
)
from pytest_circuitfreeze.models import tiny_model

FREEZER = AttentionCircuitFreezer()


def state(model):
    """All that can be seen of a model: attributes, hooks, parameters, buffers and training flags of every module."""
    return {
        name: {
            key: (value.clone() if isinstance(value, torch.Tensor) else copy.copy(value))
            for key, value in vars(module).items()
        }
        for name, module in model.named_modules()
    }, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(one, other):
    return str(one[0]) == str(other[0]) and all(torch.equal(one[1][name], other[1][name]) for name in one[1])


def test_the_one_line_functions_freeze_their_circuit(model, ids):
    for function, roles in ((freeze_qk_circuit, "qk"), (freeze_ov_circuit, "v")):
        with function(model, [1], [0, 2], freeze_type="noise", noise_std=0.0):
            recorded = FREEZER.record(model, ids, layers=[1])[1]
        for role in "qkv":
            held = getattr(recorded, role).abs().amax(dim=(0, 1, 3)) == 0
            heads = held.repeat_interleave(4 // len(held))
            expected = [True] * 4 if role != "q" and len(held) < 4 else [True, False, True, False]
            assert heads.tolist() == (expected if role in roles else [False] * 4)


def test_an_unknown_field_is_refused_by_name():
    with pytest.raises(InterventionError, match=r"strenght: unknown argument; allowed are .*strength"):
        freeze_qk_circuit(tiny_model("gpt2"), [0], [0], strenght=0.5)


def test_what_is_no_config_is_refused(model):
    for bad in ([], {}, None, [InterventionConfig(), "qk"]):
        with pytest.raises(InterventionError, match="must be an InterventionConfig"):
            FREEZER.freeze_circuits(model, bad)


def test_options_of_the_freezer_are_checked():
    with pytest.raises(InterventionError, match="on_stale_cache='loud': must be one of warn, error, ignore"):
        AttentionCircuitFreezer(on_stale_cache="loud")
    with pytest.raises(InterventionError, match="debug_gradients=1"):
        AttentionCircuitFreezer(debug_gradients=1)


def test_one_bad_config_of_several_installs_none(model):
    before = state(model)
    with pytest.raises(InterventionError, match="9 is out of range"):
        FREEZER.freeze_circuits(model, [InterventionConfig([0]), InterventionConfig([9])])
    assert same_state(before, state(model))


@pytest.mark.parametrize("scope", ["group", "head"])
def test_removal_restores_output_and_state_bit_for_bit(any_storage, ids, scope):
    before, clean = state(any_storage), any_storage(ids).logits
    handles = FREEZER.freeze_circuits(any_storage, InterventionConfig([0, 2], [1], kv_scope=scope, freeze_type="mean"))
    assert not torch.equal(any_storage(ids).logits, clean)
    FREEZER.remove_hooks(handles)
    FREEZER.remove_hooks(handles)
    assert same_state(before, state(any_storage))
    assert torch.equal(any_storage(ids).logits, clean)


def test_an_exception_in_the_forward_or_in_the_body_leaves_nothing_behind(model, ids):
    before, clean = state(model), model(ids).logits
    with pytest.raises(IndexError), FREEZER.freeze_circuits(model, InterventionConfig(freeze_type="mean")):
        model(ids + 10_000)
    with pytest.raises(KeyError), FREEZER.freeze_circuits(model, InterventionConfig(kv_scope="head", head_indices=[0])):
        raise KeyError
    assert same_state(before, state(model))
    assert torch.equal(model(ids).logits, clean)


def test_a_freeze_survives_an_exception_in_the_forward(model, ids):
    with FREEZER.freeze_circuits(model, InterventionConfig([1], freeze_type="noise")):
        frozen = model(ids).logits
        with pytest.raises(IndexError):
            model(ids + 10_000)
        assert torch.equal(model(ids).logits, frozen)


def test_nested_installs_equal_one_list_and_come_out_in_any_order(any_storage, ids):
    clean = any_storage(ids).logits
    configs = [
        InterventionConfig([0, 1], [0, 1], "qk", "mean"),
        InterventionConfig([1, 2], [1, 2], "both", "noise", kv_scope="head", strength=0.5),
        InterventionConfig([1], [2], "v", "zero", kv_scope="head"),
    ]

    def together(*chosen):
        with FREEZER.freeze_circuits(any_storage, chosen):
            return any_storage(ids).logits

    handles = [FREEZER.freeze_circuits(any_storage, config) for config in configs]
    assert torch.equal(any_storage(ids).logits, together_of(any_storage, ids, configs))
    handles[1].remove()
    rest = any_storage(ids).logits
    handles[0].remove()
    handles[2].remove()
    assert torch.equal(rest, together(configs[0], configs[2]))
    assert torch.equal(any_storage(ids).logits, clean)


def together_of(model, ids, configs):
    """What the configs give as one list, on a copy that was never frozen."""
    twin = tiny_model_like(model)
    with FREEZER.freeze_circuits(twin, configs):
        return twin(ids).logits


def tiny_model_like(model):
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def test_a_neutral_freeze_between_two_others_keeps_the_order(ids):
    model = tiny_model("mistral_gqa")
    zero = FREEZER.freeze_circuits(model, InterventionConfig([0], [0]))
    neutral = FREEZER.freeze_circuits(model, InterventionConfig([0], [0], strength=0))
    noise = FREEZER.freeze_circuits(model, InterventionConfig([0], [0], freeze_type="noise"))
    frozen = model(ids).logits
    neutral.remove()
    assert torch.equal(model(ids).logits, frozen)
    noise.remove()
    with FREEZER.freeze_circuits(tiny_model("mistral_gqa"), InterventionConfig([0], [0])):
        pass
    only_zero = model(ids).logits
    zero.remove()
    assert not torch.equal(only_zero, frozen)
    assert "forward" not in vars(model.model.layers[0].self_attn)


def test_a_live_freeze_does_not_follow_its_config(model, ids):
    layers, config = [1], InterventionConfig([1], [0], "ov")
    config.layer_indices = layers
    with FREEZER.freeze_circuits(model, config):
        frozen = model(ids).logits
        layers.append(0)
        config.circuit, config.strength = "qk", 0.5
        assert torch.equal(model(ids).logits, frozen)


def test_a_frozen_model_is_neither_copied_nor_pickled(model):
    with FREEZER.freeze_circuits(model, InterventionConfig()):
        for attempt in (copy.deepcopy, pickle.dumps, lambda frozen: torch.save(frozen, io.BytesIO())):
            with pytest.raises(CircuitFreezeError, match="remove the freeze first"):
                attempt(model)
    copy.deepcopy(model)


def test_weights_are_saved_unfrozen(model, tmp_path):
    with FREEZER.freeze_circuits(model, InterventionConfig(head_indices=[1], kv_scope="head")):
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert loaded.config.to_dict().get("num_key_value_heads") == model.config.to_dict().get("num_key_value_heads")


def test_an_attention_that_bypasses_its_projections_is_not_taken_for_frozen(ids):
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    q_proj = attention.q_proj

    class Bypass(nn.Module):
        """What attention calls is not the module that the freeze replaced."""

        weight, out_features, in_features = q_proj.weight, q_proj.out_features, q_proj.in_features

        def forward(self, x):
            return nn.functional.linear(x, self.weight, q_proj.bias)

    with FREEZER.freeze_circuits(model, InterventionConfig([1], [0], "q")):
        attention.q_proj = Bypass()
        with pytest.raises(FreezeNotInForceError, match=r"q_proj of .*self_attn was wrapped or replaced"):
            model(ids)
        attention.q_proj = q_proj
        model(ids)


def test_a_projection_that_gives_other_features_is_not_taken_for_frozen(ids):
    model = tiny_model("llama")
    model.model.layers[1].self_attn.q_proj.forward = lambda x: nn.functional.linear(x, torch.zeros(16, 32))
    freeze = FREEZER.freeze_circuits(model, InterventionConfig([1], [0], "q"))
    with freeze, pytest.raises(FreezeNotInForceError, match="gave 16 features where 32 were expected"):
        model(ids)


def test_a_forward_that_was_covered_while_frozen_is_named(ids):
    model = tiny_model("llama")
    handles = FREEZER.freeze_circuits(model, InterventionConfig([0]))
    q_proj = model.model.layers[0].self_attn.q_proj
    frozen = q_proj.forward
    q_proj.forward = lambda x: frozen(x)
    with pytest.raises(CircuitFreezeError, match=r"Linear \(q_proj of .*layers\.0\.self_attn\) was replaced again"):
        handles.remove()
    q_proj.forward = frozen
    handles.remove()
    assert "forward" not in vars(q_proj)


def test_a_forward_that_stood_on_the_instance_before_is_put_back(ids):
    model = tiny_model("llama")
    q_proj = model.model.layers[0].self_attn.q_proj
    own = q_proj.forward
    calls = []
    q_proj.forward = mine = lambda x: calls.append(1) or own(x)
    with FREEZER.freeze_circuits(model, InterventionConfig([0])):
        model(ids)
    assert calls
    assert vars(q_proj)["forward"] is mine


@pytest.mark.parametrize("name", ["gpt2", "mistral_gqa", "falcon_mqa"])
@pytest.mark.parametrize("first", ["compiled", "frozen"])
def test_a_compiled_model_is_frozen_whichever_came_first(name, first, ids):
    model = tiny_model(name)
    config = InterventionConfig([0, 2], [1], kv_scope="head")
    torch._dynamo.reset()
    with torch.no_grad():
        clean = model(ids).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        if first == "compiled":
            compiled(ids)
        with FREEZER.freeze_circuits(model, config):
            assert torch.equal(compiled(ids).logits, model(ids).logits)
            assert not torch.equal(compiled(ids).logits, clean)
        assert torch.equal(compiled(ids).logits, clean)
