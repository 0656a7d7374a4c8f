"""The public names, their values and their defaults."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

import freeze_core
from freeze_core import (
    AttentionCircuitFreezer,
    BackwardMode,
    CircuitFreezeError,
    CircuitType,
    FreezeNotInForceError,
    FreezeType,
    InterventionConfig,
    InterventionError,
    KVScope,
    ModelArchitecture,
    StaleCacheWarning,
    UnsupportedModelError,
)
from pytest_circuitfreeze.models import tiny_model


def test_public_names_are_these():
    names = """
        AttentionCircuitFreezer ExperimentalInterventions InterventionConfig
        CircuitType FreezeType BackwardMode KVScope ModelArchitecture freeze_qk_circuit freeze_ov_circuit
        score_heads HeadScores run_circuit_ablation_study AblationStudy InterventionVector
        patch_activations PatchingStudy measure_faithfulness Faithfulness
        head_circuits HeadCircuits copying_scores pattern_scores HeadMeasures
        CircuitFreezeError UnsupportedModelError InterventionError FreezeNotInForceError StaleCacheWarning
    """
    assert sorted(freeze_core.__all__) == sorted(names.split())
    assert all(hasattr(freeze_core, name) for name in freeze_core.__all__)


@pytest.mark.parametrize("error", [UnsupportedModelError, InterventionError, FreezeNotInForceError])
def test_errors_are_value_errors(error):
    assert issubclass(error, CircuitFreezeError)
    assert issubclass(CircuitFreezeError, ValueError)
    assert issubclass(StaleCacheWarning, UserWarning)


@pytest.mark.parametrize(
    ("enum", "values"),
    [
        (CircuitType, "qk ov both q k v"),
        (FreezeType, "zero mean noise reference resample"),
        (BackwardMode, "stopgrad ste circuit_ste"),
        (KVScope, "group head"),
        (ModelArchitecture, "separate_qkv fused_qkv flash_attention"),
    ],
)
def test_enums_have_these_values(enum, values):
    assert [one.value for one in enum] == values.split()


def test_config_fields_and_defaults_are_these():
    config = InterventionConfig()
    assert list(vars(config).items()) == [
        ("layer_indices", None),
        ("head_indices", None),
        ("circuit", "both"),
        ("freeze_type", "zero"),
        ("backward_mode", "stopgrad"),
        ("preserve_gradients", True),
        ("kv_scope", "group"),
        ("strength", 1.0),
        ("seed", 0),
        ("noise_std", None),
        ("statistics", None),
        ("reference", None),
        ("attention", "self"),
    ]
    config.strength = 0.5
    assert config.checked().strength == 0.5


def test_a_frozen_model_has_a_handle_for_each_config(ids):
    model = tiny_model("gpt2")
    clean = model(ids).logits
    with AttentionCircuitFreezer().freeze_circuits(model, [InterventionConfig([0]), InterventionConfig([1])]) as frozen:
        assert isinstance(frozen, Sequence)
        assert len(frozen) == 2
        frozen[0].remove()
        half = model(ids).logits
        assert not torch.equal(half, clean)
    assert torch.equal(model(ids).logits, clean)


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "falcon_mha"])
@pytest.mark.parametrize("circuit", ["qk", "ov"])
def test_scopes_are_the_same_where_no_kv_head_is_shared(name, circuit, ids):
    model = tiny_model(name)
    logits = []
    for scope in KVScope:
        config = InterventionConfig([0, 2], [1, 2], circuit, "mean", kv_scope=scope)
        with AttentionCircuitFreezer().freeze_circuits(model, config), torch.no_grad():
            logits.append(model(ids).logits)
    assert torch.equal(*logits)
