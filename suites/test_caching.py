"""Caches: with one and without one, of this freeze and of another."""

from __future__ import annotations

from hypothesis import strategies as st
from transformers import PreTrainedModel

from freeze_core import InterventionConfig
from pytest_circuitfreeze.engines import Engine
from pytest_circuitfreeze.results import CircuitRecord
from pytest_circuitfreeze.stated import STATED
from pytest_circuitfreeze.strategies import (
    LONGEST,
    Batch,
    batches,
    configs,
    in_both_scopes,
    noise_stds,
)
from pytest_circuitfreeze.suites.caching import (
    check_cached_equals_recomputed,
    check_foreign_caches_are_recognised,
    check_recomputation_is_the_same_pass,
)
from pytest_circuitfreeze.suites.properties import proven
from pytest_circuitfreeze.suites.several import observe_each

ROWS_TO_RESAMPLE = 3
"""With fewer there is one derangement, whatever an engine makes of the seed."""


@st.composite
def batch_and_rows(draw: st.DrawFn, model: PreTrainedModel) -> tuple[Batch, Batch]:
    """Several tokens, often more than a window holds, and as many in rows that can be resampled.

    Or what is stated, for both.
    """
    batch = draw(batches(model, tokens=st.just(LONGEST) | st.integers(2, LONGEST)))
    if STATED.get() is not None:
        return batch, batch
    tokens = st.just(batch.input_ids.shape[1])
    return batch, draw(batches(model, rows=st.just(ROWS_TO_RESAMPLE), tokens=tokens, padding=False))


@st.composite
def noise_and_another(draw: st.DrawFn, model: PreTrainedModel, rows: Batch) -> list[InterventionConfig]:
    """Noise in both scopes, which alone says which column of the whole a step is at, and another replacement.

    That of other rows, too, where `rows` has enough of them, and none with padding. Or the config that is stated.
    """
    if STATED.get() is not None:
        return [draw(configs(model))]
    resampled = len(rows.input_ids) >= ROWS_TO_RESAMPLE and bool(rows.real.all())
    kinds = st.sampled_from([*(["resample"] if resampled else []), "zero", "mean"])
    other = draw(configs(model, freeze_type=kinds))
    return [other, *draw(in_both_scopes(configs(model, freeze_type=st.just("noise"))))]


@proven
def test_cached_equals_recomputed(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """A freeze computes with a cache what it computes without one."""
    batch, rows = data.draw(batch_and_rows(circuit_model), label="batch")
    several = data.draw(noise_and_another(circuit_model, rows), label="configs")
    length = batch.input_ids.shape[1]
    cuts = data.draw(st.lists(st.integers(1, length - 1), min_size=1, max_size=3, unique=True), label="cuts")
    ends = [*sorted(cuts), length]
    observe_each(
        circuit_record,
        lambda config: check_cached_equals_recomputed(
            circuit_engine, circuit_model, config, rows if config.freeze_type == "resample" else batch, ends
        ),
        several,
    )


@proven
def test_foreign_caches_are_recognised(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """A cache that was filled without the freeze that it is used under is recognised, and no other is."""
    config = data.draw(configs(circuit_model), label="config")
    several = batches(circuit_model, rows=st.sampled_from([2, 3, 1]), tokens=st.integers(2, 12))
    batch = data.draw(several, label="batch")
    end = data.draw(st.integers(1, batch.input_ids.shape[1] - 1), label="end")
    circuit_record.observe(check_foreign_caches_are_recognised(circuit_engine, circuit_model, config, batch, end))


@proven
def test_recomputation_is_the_same_pass(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """A freeze, and its noise, is the same where gradient checkpointing runs layers again."""
    kinds, stds = st.sampled_from(["noise", "mean", "noise", "zero", "noise"]), st.none() | noise_stds()
    config = data.draw(configs(circuit_model, freeze_type=kinds, noise_std=stds), label="config")
    batch = data.draw(batches(circuit_model), label="batch")
    # The first of two passes is what may be run again as the last one, which shows where it is padded.
    padded = batches(circuit_model, tokens=st.integers(2, 12)).filter(lambda one: not one.real.all())
    first = data.draw(padded, label="first")
    circuit_record.observe(check_recomputation_is_the_same_pass(circuit_engine, circuit_model, config, first, batch))
