"""Gradients are those of the estimators."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st
from transformers import PreTrainedModel

from pytest_circuitfreeze.engines import Engine
from pytest_circuitfreeze.results import CircuitRecord
from pytest_circuitfreeze.strategies import attending_layers, batches, configs
from pytest_circuitfreeze.suites.gradients import (
    check_backward_modes_share_the_forward,
    check_gradients_are_the_estimators,
)
from pytest_circuitfreeze.suites.properties import proven
from pytest_circuitfreeze.suites.several import observe_each


@proven
def test_gradients_are_the_estimators(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """Gradients through a freeze are (1 - strength) times, straight through, or of the untouched circuit, by mode."""
    batch = data.draw(batches(circuit_model), label="batch")
    layers = data.draw(attending_layers(circuit_model), label="layers")
    same = configs(circuit_model, batch=batch, layers=st.just(layers), backward_mode=st.just("stopgrad"))
    several = data.draw(st.tuples(same, same), label="configs")
    ahead = data.draw(st.integers(0, 2), label="modes between two configs")
    modes = ["stopgrad", "ste", "circuit_ste"]
    in_each_mode = [
        [replace(config, backward_mode=modes[(turn + place * ahead) % 3]) for place, config in enumerate(several)]
        for turn in range(3)
    ]
    observe_each(
        circuit_record,
        lambda turn: check_gradients_are_the_estimators(circuit_engine, circuit_model, turn, batch),
        in_each_mode,
    )


@proven
def test_backward_modes_share_the_forward(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """A freeze computes the same forwards, gradients kept, whatever it does backwards."""
    batch = data.draw(batches(circuit_model), label="batch")
    config = data.draw(configs(circuit_model, batch=batch, backward_mode=st.just("stopgrad")), label="config")
    circuit_record.observe(check_backward_modes_share_the_forward(circuit_engine, circuit_model, config, batch))
