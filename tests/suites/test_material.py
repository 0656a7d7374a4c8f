"""What replacements are made of is what it is said to be, in every family that the judge knows by heart."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from by_heart import BY_HEART
from transformers import PreTrainedModel

from freeze_core import AttentionCircuitFreezer, InterventionConfig
from pytest_circuitfreeze.engines import FreezeCore
from pytest_circuitfreeze.models import tiny_model
from pytest_circuitfreeze.recordings import recorded
from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.gradients import check_gradients_are_the_estimators
from pytest_circuitfreeze.suites.judge.expected_replacements import material_of
from pytest_circuitfreeze.suites.judge.head_discovery import discover_sites
from pytest_circuitfreeze.suites.judge.known_families import known_sites
from pytest_circuitfreeze.suites.references import check_recordings_are_what_attention_saw

IDS = torch.tensor([[7, 3, 11, 5, 2], [4, 19, 6, 23, 8]])
PADDED = Batch(IDS, torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]))


@cache
def model(name: str) -> PreTrainedModel:
    return tiny_model(name)


@pytest.mark.parametrize("name", BY_HEART)
def test_discovery_finds_what_is_known_by_heart(name: str) -> None:
    known, found = known_sites(model(name)), discover_sites(model(name))
    assert known.keys() == found.keys()
    for layer, site in known.items():
        other = found[layer]
        assert (site.layers, site.name, site.output_name) == (other.layers, other.name, other.output_name)
        assert (site.heads, site.group, list(site.parts)) == (other.heads, other.group, list(other.parts))
        for role, part in site.parts.items():
            of_other = other.parts[role]
            assert (part.path, part.width, part.readers) == (of_other.path, of_other.width, of_other.readers)
            assert torch.equal(part.features, of_other.features)


@pytest.mark.parametrize("name", BY_HEART)
def test_recordings_are_what_the_judge_sees(name: str) -> None:
    margin = check_recordings_are_what_attention_saw(model(name), recorded(model(name), PADDED))
    assert margin == (0.0, 0.0)


@pytest.mark.parametrize("circuit", ["qk", "ov", "both"])
@pytest.mark.parametrize("name", BY_HEART)
def test_the_untouched_circuits_gradient_is_known(name: str, circuit: str) -> None:
    config = InterventionConfig([1], [1], circuit, backward_mode="circuit_ste", kv_scope="head")
    margin = check_gradients_are_the_estimators(FreezeCore(), model(name), [config], PADDED)
    assert margin.error <= margin.bound


def test_a_recording_that_does_not_say_what_it_is_of_is_no_material() -> None:
    plain = AttentionCircuitFreezer().record(model("gpt2"), IDS)
    config = InterventionConfig(freeze_type="reference", reference=plain)
    with pytest.raises(TypeError, match=r"does not say what it was taken of: make it with recorded\(\)"):
        material_of(FreezeCore(), model("gpt2"), [config], Batch(IDS))
