"""A config is refused when built, and again when used, with the field, the value and what is allowed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from freeze_core import BackwardMode, CircuitType, FreezeType, InterventionConfig, InterventionError, KVScope

BAD = [
    ("layer_indices", [], "not empty"),
    ("layer_indices", [True], "bool is not an index"),
    ("layer_indices", [0, 0], "repeated"),
    ("layer_indices", [1.0], "distinct ints"),
    ("layer_indices", "01", "distinct ints"),
    ("layer_indices", 3, "distinct ints"),
    ("head_indices", [], "not empty"),
    ("head_indices", [None], "distinct ints"),
    ("head_indices", [False, 1], "bool is not an index"),
    ("circuit", "qv", "one of qk, ov, both, q, k, v"),
    ("circuit", None, "one of qk"),
    ("freeze_type", "ablate", "one of zero, mean, noise"),
    ("backward_mode", "straight", "one of stopgrad, ste"),
    ("kv_scope", "heads", "one of group, head"),
    ("preserve_gradients", 1, "True or False"),
    ("strength", math.nan, "finite number in [0, 1]"),
    ("strength", math.inf, "finite number in [0, 1]"),
    ("strength", 1.5, "finite number in [0, 1]"),
    ("strength", -0.1, "finite number in [0, 1]"),
    ("strength", True, "finite number in [0, 1]"),
    ("strength", "1", "finite number in [0, 1]"),
    ("noise_std", -1.0, "not negative"),
    ("noise_std", math.nan, "not negative"),
    ("noise_std", False, "not negative"),
    ("seed", 1.0, "an int"),
    ("seed", True, "an int"),
    ("seed", None, "an int"),
    ("attention", "sideways", "one of self, cross, encoder"),
    ("attention", None, "one of self, cross, encoder"),
    ("statistics", 0.5, "what AttentionCircuitFreezer.calibrate returns"),
    ("reference", {}, "under freeze_type 'zero', which does not use it"),
]


@pytest.mark.parametrize(("field", "value", "allowed"), BAD)
def test_a_bad_field_is_refused_by_name_value_and_range(field, value, allowed):
    with pytest.raises(InterventionError) as error:
        InterventionConfig(**{field: value})
    assert field in str(error.value)
    assert str(value) in str(error.value)
    assert allowed in str(error.value)


@pytest.mark.parametrize("reference", [None, {}, "recording"])
def test_a_reference_that_is_no_recording_is_refused(reference):
    with pytest.raises(InterventionError, match=r"reference=.*what AttentionCircuitFreezer\.record returns"):
        InterventionConfig(freeze_type="reference", reference=reference)


@pytest.mark.parametrize(("field", "value", "allowed"), BAD)
def test_a_field_that_was_spoilt_later_is_refused_when_used(field, value, allowed):
    config = InterventionConfig()
    setattr(config, field, value)
    with pytest.raises(InterventionError, match=field):
        config.checked()


def test_strings_and_enums_are_the_same():
    by_name = InterventionConfig([0], [1], "qk", "mean", "ste", kv_scope="head")
    by_enum = InterventionConfig([0], [1], CircuitType.QK, FreezeType.MEAN, BackwardMode.STE, kv_scope=KVScope.HEAD)
    assert by_name == by_enum


@pytest.mark.parametrize("indices", [(0, 2), range(3), [np.int64(1)], [-1]])
def test_any_sequence_of_ints_is_an_index_list(indices):
    assert InterventionConfig(layer_indices=indices, head_indices=indices)


def test_the_circuits_name_their_activations():
    assert {circuit.value: "".join(circuit.roles) for circuit in CircuitType} == {
        "qk": "qk",
        "ov": "v",
        "both": "qkv",
        "q": "q",
        "k": "k",
        "v": "v",
    }


@pytest.mark.parametrize("field", ["circuit", "freeze_type", "backward_mode", "kv_scope", "attention"])
def test_a_word_that_is_none_is_refused_by_its_field(field):
    with pytest.raises(InterventionError, match=f"^{field}='none such': must be one of "):
        InterventionConfig(**{field: "none such"})
