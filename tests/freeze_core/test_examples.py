"""The examples that users start from, on tiny models, and what their comments promise."""

from __future__ import annotations

import copy

import pytest
import torch

from freeze_core import (
    AttentionCircuitFreezer,
    BackwardMode,
    CircuitType,
    ExperimentalInterventions,
    FreezeType,
    InterventionConfig,
    ModelArchitecture,
    freeze_ov_circuit,
    freeze_qk_circuit,
)
from pytest_circuitfreeze.models import tiny_model


def test_quick_start(ids):
    model = tiny_model("gpt2")
    model_copy = copy.deepcopy(model)
    hooks = freeze_qk_circuit(model_copy, layer_indices=[0, 1], head_indices=[3, 2])
    output = model_copy(ids).logits
    assert not torch.equal(output, model(ids).logits)
    for hook in hooks:
        hook.remove()
    assert torch.equal(model_copy(ids).logits, model(ids).logits)


def test_comparing_qk_with_ov(ids):
    freezer = AttentionCircuitFreezer()
    base_model = tiny_model("gpt2")
    with torch.no_grad():
        baseline_output = base_model(ids).logits
    qk_model = copy.deepcopy(base_model)
    config = InterventionConfig(
        layer_indices=[1, 2], head_indices=[0, 1, 2, 3], circuit=CircuitType.QK, freeze_type=FreezeType.ZERO
    )
    qk_hooks = freezer.freeze_circuits(qk_model, config)
    with torch.no_grad():
        qk_output = qk_model(ids).logits
    ov_model = copy.deepcopy(base_model)
    config.circuit = CircuitType.OV  # the live freeze of the other model does not follow
    ov_hooks = freezer.freeze_circuits(ov_model, config)
    with torch.no_grad():
        ov_output = ov_model(ids).logits
        assert torch.equal(qk_model(ids).logits, qk_output)
    assert (baseline_output - qk_output).abs().mean() > 0
    assert (baseline_output - ov_output).abs().mean() > 0
    assert not torch.equal(qk_output, ov_output)
    freezer.remove_hooks(qk_hooks)
    freezer.remove_hooks(ov_hooks)
    assert torch.equal(qk_model(ids).logits, baseline_output)
    assert torch.equal(ov_model(ids).logits, baseline_output)


def test_grouped_heads(ids):
    """Freezing query heads 2 and 3 freezes each of their queries, and the KV head that serves them both."""
    model = tiny_model("mistral_gqa")
    freezer = AttentionCircuitFreezer()
    config = freezer.get_model_config(model)
    assert (config["num_heads"], config["num_kv_heads"]) == (4, 2)
    config = InterventionConfig(layer_indices=[2], head_indices=[2, 3], circuit=CircuitType.QK)
    hooks = freezer.freeze_circuits(model, config)
    held = freezer.record(model, ids)[2]
    assert (held.q.abs().amax(dim=(0, 1, 3)) == 0).tolist() == [False, False, True, True]
    assert (held.k.abs().amax(dim=(0, 1, 3)) == 0).tolist() == [False, True]
    assert (held.v != 0).all()
    freezer.remove_hooks(hooks)


def test_detection():
    freezer = AttentionCircuitFreezer()
    assert freezer.detect_architecture(tiny_model("gpt2")).value == "fused_qkv"
    assert freezer.detect_architecture(tiny_model("llama")) == ModelArchitecture.SEPARATE_QKV


def gradient_norms(model, ids, config):
    freezer = AttentionCircuitFreezer(debug_gradients=True)
    stats = freezer.check_gradient_behavior(model, ids, config)
    assert stats["validation_passed"]
    return {
        name.split("self_attn.")[1]: one for name, one in stats["parameters"].items() if "layers.0.self_attn" in name
    }


def test_gradients_under_stopgrad_and_ste(ids, capsys):
    """All heads' queries and keys at zero: stopgrad gives exactly no gradient, and so does ste.

    Under `ste` the gradient passes unchanged, but it arrives as 0: dq is a sum of keys, dk one of queries, and both
    are 0. With the mean, whose keys do not vanish, the gradient of the queries flows; `circuit_ste` always has it.
    """
    model = tiny_model("llama")
    config = InterventionConfig([0], None, circuit=CircuitType.QK, backward_mode="stopgrad")
    weights = ("q_proj.weight", "k_proj.weight")
    stopgrad = gradient_norms(model, ids, config)
    assert [stopgrad[name]["norm"] for name in weights] == [0.0, 0.0]
    assert [stopgrad[name]["nonzero"] for name in weights] == [0.0, 0.0]
    config.backward_mode = "ste"
    ste = gradient_norms(model, ids, config)
    assert [ste[name]["norm"] for name in weights] == [0.0, 0.0]
    config.freeze_type = "mean"
    assert gradient_norms(model, ids, config)["q_proj.weight"]["norm"] > 0
    config.freeze_type, config.backward_mode = "zero", BackwardMode.CIRCUIT_STE
    circuit = gradient_norms(model, ids, config)
    assert all(circuit[name]["norm"] > 0 for name in weights)
    assert "self_attn.q_proj.weight" in capsys.readouterr().out


def test_embeddings_as_test_input_and_the_effect(ids):
    freezer = AttentionCircuitFreezer()
    model = tiny_model("gpt2")
    model_sg = copy.deepcopy(model)
    config_sg = InterventionConfig([0, 1], [0, 1, 2], circuit=CircuitType.QK, backward_mode="stopgrad")
    freezer.freeze_circuits(model_sg, config_sg)
    test_input = torch.randn(1, 10, 32, requires_grad=True)
    assert freezer.check_gradient_behavior(model_sg, test_input, config_sg)["validation_passed"]
    effect_stats = freezer.verify_intervention_effect(
        model_baseline=model, model_intervened=model_sg, test_input=test_input, config=config_sg
    )
    assert effect_stats["max_absolute_diff"] > 0


def test_an_ablation_loop(ids):
    """The loop of a study: nothing is left behind between its rounds.

    At zero, both circuits are as good as OV alone: where a head looks does not matter if it moves nothing.
    """
    model, freezer = tiny_model("llama_gqa"), AttentionCircuitFreezer()
    baseline = model(ids, labels=ids).loss
    losses = {}
    for circuit in (CircuitType.QK, CircuitType.OV, CircuitType.BOTH):
        model_copy = copy.deepcopy(model)
        config = InterventionConfig([0, 1], [0, 3], circuit, FreezeType.ZERO, preserve_gradients=True)
        hooks = freezer.freeze_circuits(model_copy, config)
        losses[circuit.value] = model_copy(ids, labels=ids).loss.item()
        freezer.remove_hooks(hooks)
        assert model_copy(ids, labels=ids).loss == baseline
    assert losses["both"] == losses["ov"]
    assert len({losses["qk"], losses["ov"], baseline.item()}) == 3


def test_generation_is_frozen_in_its_cache_as_well(ids):
    """What was once a warning: the cached history is as frozen as the new tokens."""
    model = tiny_model("llama")
    with freeze_ov_circuit(model, [1], [0, 2]):
        cached = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=True, pad_token_id=0)
        whole = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False, pad_token_id=0)
    assert torch.equal(cached, whole)


def test_stating_the_architecture_and_freezing_whole_heads(ids):
    model = tiny_model("llama")
    config = InterventionConfig([0], [1])
    AttentionCircuitFreezer().freeze_circuits(model, config, architecture=ModelArchitecture.SEPARATE_QKV).remove()
    hooks = ExperimentalInterventions().freeze_attention_heads(model, {0: [1, 2]})
    assert not torch.equal(model(ids).logits, tiny_model("llama")(ids).logits)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("circuit", ["qk", "q"])
def test_the_queries_of_one_grouped_head_alone(circuit, ids):
    """`circuit="q"` freezes one head's queries and nothing shared; `kv_scope="head"` its keys as well."""
    model = tiny_model("llama_gqa")
    freezer = AttentionCircuitFreezer()
    config = InterventionConfig([0], [3], circuit, kv_scope="head")
    clean = freezer.record(model, ids, pattern=True)[0].pattern
    with freezer.freeze_circuits(model, config):
        frozen = freezer.record(model, ids, pattern=True)[0].pattern
    torch.testing.assert_close(frozen[:, :3], clean[:, :3], rtol=0, atol=1e-6)
    assert not torch.allclose(frozen[:, 3], clean[:, 3])
