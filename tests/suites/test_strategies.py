"""What the strategies draw is within bounds, reaches the corners, and shrinks as they say."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample
from transformers import PreTrainedModel

from freeze_core import AttentionCircuitFreezer, InterventionConfig, UnsupportedModelError
from pytest_circuitfreeze import recordings
from pytest_circuitfreeze.models import tiny_model
from pytest_circuitfreeze.recordings import Recorded, calibrated, moved_to, recorded
from pytest_circuitfreeze.strategies import (
    Batch,
    attending_layers,
    backward_modes,
    batches,
    circuits,
    configs,
    configs_of_each_kind,
    configs_without_statistics,
    freeze_types,
    head_indices,
    heads_by_layer,
    in_both_scopes,
    layer_indices,
    noise_stds,
    scopes,
    seeds,
    strengths,
)
from pytest_circuitfreeze.suites.tolerance import nudged

quickly = settings(max_examples=60, deadline=None, database=None, derandomize=True)


@cache
def model() -> PreTrainedModel:
    return tiny_model("gpt2")


def smallest(strategy: st.SearchStrategy[Any], wanted: Any = lambda _: True) -> Any:
    return find(strategy, wanted, settings=settings(max_examples=500, database=None, derandomize=True))


@pytest.mark.parametrize(
    ("strategy", "least"),
    [
        (layer_indices(5), [0]),
        (head_indices(5), [0]),
        (circuits(), "ov"),
        (freeze_types(), "zero"),
        (backward_modes(), "stopgrad"),
        (scopes(), "group"),
        (strengths(), 1.0),
        (seeds(), 0),
        (noise_stds(), None),
    ],
)
def test_shrinks_as_said(strategy: st.SearchStrategy[Any], least: Any) -> None:
    assert smallest(strategy) == least


def test_config_shrinks_to_values_of_one_head_to_zero() -> None:
    least = smallest(configs(model()))
    assert (least.layer_indices, least.head_indices) == ([0], [0])
    assert (least.circuit, least.freeze_type, least.kv_scope, least.strength) == ("ov", "zero", "group", 1.0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_drawn_on_both_sides(side: str) -> None:
    def padded(batch: Batch) -> bool:
        return not batch.real[:, 0 if side == "left" else -1].all()

    least = smallest(batches(model()), padded)
    assert least.input_ids.shape == (1, 2)
    assert least.real.tolist() == [[False, True] if side == "left" else [True, False]]


@quickly
@given(data=st.data())
def test_batches_are_well_formed(data: st.DataObject) -> None:
    batch = data.draw(batches(model()))
    rows, tokens = batch.input_ids.shape
    assert 1 <= rows <= 3
    assert 1 <= tokens <= 12
    assert batch.input_ids.max() < 97
    assert batch.real.any(dim=1).all()
    arguments = batch.arguments(model())
    assert arguments["use_cache"] is False
    for row, real in enumerate(batch.real):
        positions = arguments["position_ids"][row][real]
        assert positions.tolist() == list(range(int(real.sum())))


@quickly
@given(data=st.data())
def test_configs_are_of_the_model(data: st.DataObject) -> None:
    config = data.draw(configs(model(), kv_scope=st.just("head")))
    assert set(config.layer_indices) <= {0, 1, 2}
    assert set(config.head_indices) <= {0, 1, 2, 3}
    assert config.kv_scope == "head"
    assert 0 < config.strength <= 1


@quickly
@given(data=st.data())
def test_configs_without_statistics_have_none(data: st.DataObject) -> None:
    config = data.draw(configs_without_statistics(model()))
    assert config.freeze_type == "zero" or config.noise_std is not None


@quickly
@given(data=st.data())
def test_configs_for_a_batch_can_be_run_with_it(data: st.DataObject) -> None:
    batch = data.draw(batches(model()))
    config = data.draw(configs(model(), batch=batch))
    if config.freeze_type == "resample":
        assert len(batch.input_ids) > 1
        assert batch.real.all()
    if config.freeze_type == "reference":
        assert isinstance(config.reference, Recorded)
        source = config.reference.source
        assert source.input_ids.shape[1] == batch.input_ids.shape[1]
        assert len(source.input_ids) in (1, len(batch.input_ids))
        assert bool((source.real == batch.real).all())
    with AttentionCircuitFreezer().freeze_circuits(model(), config):
        model()(**batch.arguments(model()))


@quickly
@given(data=st.data())
def test_each_kind_is_drawn_once_and_can_be_run(data: st.DataObject) -> None:
    batch = data.draw(batches(model()))
    several = data.draw(configs_of_each_kind(model(), batch))
    found = [(str(one.freeze_type), one.noise_std is not None, one.statistics is not None) for one in several]
    whole = len(batch.input_ids) > 1 and bool(batch.real.all())
    assert sorted(found) == [
        ("mean", False, False),
        ("mean", False, True),
        ("noise", False, False),
        ("noise", False, True),
        ("noise", True, False),
        ("reference", False, False),
        *([("resample", False, False)] if whole else []),
        ("zero", False, False),
    ]
    for config in several:
        with AttentionCircuitFreezer().freeze_circuits(model(), config):
            model()(**batch.arguments(model()))


def test_what_cannot_be_recorded_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise UnsupportedModelError("not this one")

    for name in ("recorded", "calibrated"):
        monkeypatch.setattr(recordings, name, refuse)
    kinds = [str(one.freeze_type) for one in smallest(configs_of_each_kind(model(), Batch(torch.tensor([[1]]))))]
    assert kinds == ["zero", "mean", "noise", "noise"]


def test_both_scopes_are_of_the_same_freeze() -> None:
    group, head = smallest(in_both_scopes(configs(model(), circuit=st.just("qk"))))
    assert (group.kv_scope, head.kv_scope) == ("group", "head")
    assert replace(head, kv_scope="group") == group


def test_layers_are_those_with_attention() -> None:
    assert smallest(attending_layers(model()), lambda chosen: len(chosen) == 2) == [0, 1]
    hybrid = tiny_model("qwen3_next")
    (only,) = heads_by_layer(hybrid)
    assert only > 0
    assert smallest(attending_layers(hybrid)) == [only]


@pytest.mark.parametrize("kind", ["reference", "resample", "mean", "noise"])
def test_replacements_from_elsewhere_are_drawn_for_a_batch_alone(kind: str) -> None:
    def elsewhere(config: Any) -> bool:
        return config.freeze_type == kind and (kind in ("reference", "resample") or config.statistics is not None)

    batch = Batch(torch.tensor([[1, 2], [3, 4]]))
    assert elsewhere(smallest(configs(model(), batch=batch), elsewhere))
    with pytest.raises(NoSuchExample):
        smallest(configs(model()), elsewhere)


def test_freezes_are_moved_to_a_copy_with_what_they_hold() -> None:
    batch = Batch(torch.tensor([[1, 2], [3, 4]]))
    other = nudged(model())
    held = InterventionConfig(freeze_type="reference", reference=recorded(model(), batch))
    moved = moved_to(held, other).reference
    assert isinstance(moved, Recorded)
    assert held.reference is not None
    assert moved.source is batch
    assert not torch.equal(moved[1].q, held.reference[1].q)
    known = InterventionConfig(freeze_type="mean", statistics=calibrated(model(), [batch]))
    assert known.statistics is not None
    assert moved_to(known, other).statistics.identity != known.statistics.identity
    plain = InterventionConfig()
    assert moved_to(plain, other) is plain


def test_batch_without_mask_hands_over_none() -> None:
    batch = Batch(torch.tensor([[1, 2]]))
    assert "attention_mask" not in batch.arguments(model())
    assert batch.real.all()
    assert repr(batch) == "Batch(input_ids=[[1, 2]], attention_mask=None)"
