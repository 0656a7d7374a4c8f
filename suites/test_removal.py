"""Afterwards the model is what it was."""

from __future__ import annotations

from hypothesis import strategies as st
from transformers import PreTrainedModel

from pytest_circuitfreeze.engines import Engine
from pytest_circuitfreeze.results import CircuitRecord
from pytest_circuitfreeze.strategies import batches, configs, noise_stds
from pytest_circuitfreeze.suites.properties import proven
from pytest_circuitfreeze.suites.removal import (
    check_error_in_body_leaves_no_trace,
    check_error_in_forward_leaves_no_trace,
    check_freezes_can_be_repeated,
    check_nesting_is_a_list,
    check_removal_leaves_no_trace,
)


@proven
def test_removal_leaves_no_trace(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """After a freeze the model is what it was, bit for bit and attribute by attribute."""
    batch = data.draw(batches(circuit_model), label="batch")
    config = data.draw(configs(circuit_model, batch=batch), label="config")
    circuit_record.observe(check_removal_leaves_no_trace(circuit_engine, circuit_model, config, batch))


@proven
def test_error_in_body_leaves_no_trace(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """After an error under a freeze the model is what it was."""
    batch = data.draw(batches(circuit_model), label="batch")
    config = data.draw(configs(circuit_model, batch=batch), label="config")
    interrupted = data.draw(st.booleans(), label="interrupted")
    circuit_record.observe(
        check_error_in_body_leaves_no_trace(circuit_engine, circuit_model, config, batch, interrupted)
    )


@proven
def test_error_in_forward_leaves_no_trace(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """After an error inside a frozen layer the next pass is right, and so is the model afterwards."""
    batch = data.draw(batches(circuit_model), label="batch")
    config = data.draw(configs(circuit_model, batch=batch), label="config")
    interrupted = data.draw(st.booleans(), label="interrupted")
    circuit_record.observe(
        check_error_in_forward_leaves_no_trace(circuit_engine, circuit_model, config, batch, interrupted)
    )


@proven
def test_freezes_can_be_repeated(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """A freeze gives the same again: on later passes, after another batch, installed anew."""
    # Statistics of the pass are what a freeze could take over from another one.
    kinds, stds = st.sampled_from(["mean", "zero", "noise", "mean"]), st.none() | noise_stds()
    config = data.draw(configs(circuit_model, freeze_type=kinds, noise_std=stds), label="config")
    batch = data.draw(batches(circuit_model), label="batch")
    other = data.draw(batches(circuit_model), label="other")
    circuit_record.observe(check_freezes_can_be_repeated(circuit_engine, circuit_model, config, batch, other))


@proven
def test_nesting_is_a_list(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """Nested freezes equal one list in order, and may leave in any order."""
    batch = data.draw(batches(circuit_model), label="batch")
    several = data.draw(st.lists(configs(circuit_model, batch=batch), min_size=2, max_size=3), label="configs")
    ends = data.draw(st.permutations(range(len(several))), label="ends")
    circuit_record.observe(check_nesting_is_a_list(circuit_engine, circuit_model, several, batch, ends))
