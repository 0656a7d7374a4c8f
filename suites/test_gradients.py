"""Gradients are those of the estimators."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st
from transformers import PreTrainedModel

from freeze_core import InterventionConfig
from pytest_circuitfreeze.engines import Engine
from pytest_circuitfreeze.results import CircuitRecord
from pytest_circuitfreeze.stated import STATED
from pytest_circuitfreeze.strategies import Batch, attending_layers, batches, configs
from pytest_circuitfreeze.suites.gradients import (
    check_backward_modes_share_the_forward,
    check_gradients_are_the_estimators,
)
from pytest_circuitfreeze.suites.properties import proven
from pytest_circuitfreeze.suites.several import observe_each


@st.composite
def alone_and_in_pairs(draw: st.DrawFn, model: PreTrainedModel, batch: Batch) -> list[list[InterventionConfig]]:
    """A config alone, which may be stated; else also with another on its layers, each in every backward mode."""
    layers = draw(attending_layers(model))
    same = configs(model, batch=batch, layers=st.just(layers))
    first = draw(same)
    if first is STATED.get():
        return [[first]]
    second, apart = draw(same), draw(st.integers(0, 2))
    modes = ["stopgrad", "ste", "circuit_ste"]
    pairs = [
        [replace(first, backward_mode=modes[turn]), replace(second, backward_mode=modes[(turn + apart) % 3])]
        for turn in range(3)
    ]
    return [[first], *pairs]


@proven
def test_gradients_are_the_estimators(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """Gradients through a freeze are (1 - strength) times, straight through, or of the untouched circuit, by mode."""
    batch = data.draw(batches(circuit_model), label="batch")
    several = data.draw(alone_and_in_pairs(circuit_model, batch), label="configs")
    observe_each(
        circuit_record,
        lambda configs: check_gradients_are_the_estimators(circuit_engine, circuit_model, configs, batch),
        several,
    )


@proven
def test_backward_modes_share_the_forward(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """A freeze computes the same forwards, gradients kept, whatever it does backwards."""
    batch = data.draw(batches(circuit_model), label="batch")
    config = data.draw(configs(circuit_model, batch=batch, backward_mode=st.just("stopgrad")), label="config")
    circuit_record.observe(check_backward_modes_share_the_forward(circuit_engine, circuit_model, config, batch))
