"""Caches: with one and without one, of this freeze and of another."""

from __future__ import annotations

from hypothesis import strategies as st
from transformers import PreTrainedModel

from freeze_core import InterventionConfig
from pytest_circuitfreeze.engines import Engine
from pytest_circuitfreeze.results import CircuitRecord
from pytest_circuitfreeze.stated import STATED
from pytest_circuitfreeze.strategies import batches, configs, configs_without_statistics, in_both_scopes
from pytest_circuitfreeze.suites.caching import (
    check_cached_equals_recomputed,
    check_foreign_caches_are_recognised,
    check_recomputation_is_the_same_pass,
)
from pytest_circuitfreeze.suites.properties import proven
from pytest_circuitfreeze.suites.several import observe_each


@st.composite
def noise_and_another(draw: st.DrawFn, model: PreTrainedModel) -> list[InterventionConfig]:
    """Noise in both scopes, which alone says which column of the whole a step is at, and another replacement.

    Or the config that is stated.
    """
    if STATED.get() is not None:
        return [draw(configs(model))]
    other = draw(configs(model, freeze_type=st.sampled_from(["zero", "mean"])))
    return [other, *draw(in_both_scopes(configs(model, freeze_type=st.just("noise"))))]


@proven
def test_cached_equals_recomputed(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """A freeze computes with a cache what it computes without one."""
    several = data.draw(noise_and_another(circuit_model), label="configs")
    batch = data.draw(batches(circuit_model, tokens=st.integers(2, 12)), label="batch")
    length = batch.input_ids.shape[1]
    cuts = data.draw(st.lists(st.integers(1, length - 1), min_size=1, unique=True), label="cuts")
    ends = [*sorted(cuts), length]
    observe_each(
        circuit_record,
        lambda config: check_cached_equals_recomputed(circuit_engine, circuit_model, config, batch, ends),
        several,
    )


@proven
def test_foreign_caches_are_recognised(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """A cache that was filled without the freeze that it is used under is recognised, and no other is."""
    config = data.draw(configs(circuit_model), label="config")
    batch = data.draw(batches(circuit_model, tokens=st.integers(2, 12)), label="batch")
    end = data.draw(st.integers(1, batch.input_ids.shape[1] - 1), label="end")
    circuit_record.observe(check_foreign_caches_are_recognised(circuit_engine, circuit_model, config, batch, end))


@proven
def test_recomputation_is_the_same_pass(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """A freeze, and its noise, is the same where gradient checkpointing runs layers again."""
    config = data.draw(configs_without_statistics(circuit_model), label="config")
    batch, other = (data.draw(batches(circuit_model), label=label) for label in ("batch", "other"))
    circuit_record.observe(check_recomputation_is_the_same_pass(circuit_engine, circuit_model, config, batch, other))
