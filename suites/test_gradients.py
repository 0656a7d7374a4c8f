"""Gradients are those of the estimators."""

from __future__ import annotations

from hypothesis import strategies as st
from transformers import PreTrainedModel

from pytest_circuitfreeze.engines import Engine
from pytest_circuitfreeze.results import CircuitRecord
from pytest_circuitfreeze.strategies import batches, configs
from pytest_circuitfreeze.suites.gradients import (
    check_backward_modes_share_the_forward,
    check_gradients_are_the_estimators,
)
from pytest_circuitfreeze.suites.properties import proven


@proven
def test_gradients_are_the_estimators(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """Gradients through a freeze are (1 - strength) times, straight through, or of the untouched circuit, by mode."""
    batch = data.draw(batches(circuit_model), label="batch")
    several = data.draw(st.lists(configs(circuit_model, batch=batch), min_size=1, max_size=2), label="configs")
    circuit_record.observe(check_gradients_are_the_estimators(circuit_engine, circuit_model, several, batch))


@proven
def test_backward_modes_share_the_forward(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """A freeze computes the same forwards, gradients kept, whatever it does backwards."""
    batch = data.draw(batches(circuit_model), label="batch")
    config = data.draw(configs(circuit_model, batch=batch, backward_mode=st.just("stopgrad")), label="config")
    circuit_record.observe(check_backward_modes_share_the_forward(circuit_engine, circuit_model, config, batch))
