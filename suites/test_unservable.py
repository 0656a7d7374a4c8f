"""Nothing is served wrongly in silence."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st
from transformers import PreTrainedModel

from pytest_circuitfreeze.engines import Engine
from pytest_circuitfreeze.recordings import Recorded, recorded
from pytest_circuitfreeze.results import CircuitRecord
from pytest_circuitfreeze.strategies import Batch, batches, calibrations, configs
from pytest_circuitfreeze.suites.properties import proven
from pytest_circuitfreeze.suites.several import observe_each
from pytest_circuitfreeze.suites.tolerance import nudged
from pytest_circuitfreeze.suites.unservable import check_what_cannot_be_served_is_an_error


def _without_first_column(batch: Batch) -> Batch:
    return Batch(batch.input_ids[:, 1:], None if batch.attention_mask is None else batch.attention_mask[:, 1:])


def _with_one_more_column(batch: Batch) -> Batch:
    ids, mask = batch.input_ids, batch.attention_mask
    return Batch(torch.cat([ids, ids[:, -1:]], dim=1), None if mask is None else torch.cat([mask, mask[:, -1:]], dim=1))


@st.composite
def with_padding(draw: st.DrawFn, batch: Batch) -> Batch:
    """`batch` with one padded position, at the beginning or the end of a row."""
    mask = torch.ones_like(batch.input_ids)
    mask[draw(st.integers(0, len(mask) - 1)), draw(st.sampled_from([0, -1]))] = 0
    return Batch(batch.input_ids, mask)


@proven
def test_references_that_do_not_fit_are_errors(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """A pass of another length, of other rows or padded otherwise than the reference is an error."""
    several = batches(circuit_model, rows=st.integers(2, 3), tokens=st.integers(2, 12), padding=False)
    batch = data.draw(several, label="recorded in the shape of")
    config = data.draw(configs(circuit_model, batch=batch, freeze_type=st.just("reference")), label="config")
    more = Batch(batch.input_ids.repeat(2, 1))
    padded = data.draw(with_padding(batch), label="padded")
    others = [_without_first_column(batch), padded]
    held = config.reference
    if isinstance(held, Recorded) and len(held.source.input_ids) > 1:  # one row serves all
        others.append(more)
    other = data.draw(st.sampled_from(others), label="batch")
    flipped = Batch(padded.input_ids, padded.real.long().flip(1))
    held_padded = replace(config, reference=recorded(circuit_model, padded, config.layer_indices))
    cases = [
        (config, other, 0),
        (held_padded, flipped, 0),
        (config, _with_one_more_column(batch), batch.input_ids.shape[1]),
    ]
    observe_each(
        circuit_record,
        lambda case: check_what_cannot_be_served_is_an_error(circuit_engine, circuit_model, *case),
        cases,
    )


@proven
def test_resampling_without_another_row_is_an_error(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """Resampling in a batch of one row, or with padding, is an error."""
    config = data.draw(configs(circuit_model, freeze_type=st.just("resample")), label="config")
    several = batches(circuit_model, rows=st.integers(2, 3), tokens=st.integers(2, 12), padding=False)
    alone = batches(circuit_model, rows=st.just(1))
    batch = data.draw(st.one_of(alone, several.flatmap(with_padding)), label="batch")
    circuit_record.observe(check_what_cannot_be_served_is_an_error(circuit_engine, circuit_model, config, batch))


@proven
def test_statistics_of_a_cached_step_are_errors(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """A decoding step under statistics of the pass, which it sees a part of, is an error."""
    of_the_pass = configs(circuit_model, freeze_type=st.sampled_from(["mean", "noise"]), noise_std=st.none())
    config = data.draw(of_the_pass, label="config")
    batch = data.draw(batches(circuit_model, tokens=st.integers(2, 12), padding=False), label="batch")
    cached = data.draw(st.integers(1, batch.input_ids.shape[1] - 1), label="cached")
    circuit_record.observe(
        check_what_cannot_be_served_is_an_error(circuit_engine, circuit_model, config, batch, cached)
    )


@proven
def test_statistics_of_another_model_are_errors(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """Statistics that were calibrated on another model, however like this one, are an error."""
    config = data.draw(configs(circuit_model, freeze_type=st.just("mean")), label="config")
    batch = data.draw(batches(circuit_model), label="batch")
    foreign = data.draw(calibrations(nudged(circuit_model, torch.bfloat16), config.layer_indices), label="statistics")
    config = replace(config, statistics=foreign)
    circuit_record.observe(check_what_cannot_be_served_is_an_error(circuit_engine, circuit_model, config, batch))
