"""What the strategies draw is within bounds, reaches the corners, and shrinks as they say."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from pytest_circuitfreeze.models import tiny_model
from pytest_circuitfreeze.strategies import (
    Batch,
    batches,
    circuits,
    configs,
    configs_without_statistics,
    freeze_types,
    head_indices,
    layer_indices,
    noise_stds,
    scopes,
    seeds,
    strengths,
)

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


def test_batch_without_mask_hands_over_none() -> None:
    batch = Batch(torch.tensor([[1, 2]]))
    assert "attention_mask" not in batch.arguments(model())
    assert batch.real.all()
    assert repr(batch) == "Batch(input_ids=[[1, 2]], attention_mask=None)"
