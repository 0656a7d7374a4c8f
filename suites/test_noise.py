"""Noise is normal and knows its place."""

from __future__ import annotations

from hypothesis import strategies as st
from transformers import PreTrainedModel

from pytest_circuitfreeze.engines import Engine
from pytest_circuitfreeze.results import CircuitRecord
from pytest_circuitfreeze.strategies import batches, configs, seeds
from pytest_circuitfreeze.suites.noise import check_noise_depends_on_its_place_alone, check_noise_is_standard_normal
from pytest_circuitfreeze.suites.properties import proven


@proven
def test_noise_is_standard_normal(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """Noise is standard normal, and unrelated across seed, layer, activation, column, head and feature."""
    seed = data.draw(seeds(), label="seed")
    circuit_record.observe(check_noise_is_standard_normal(circuit_engine, circuit_model, seed))


@proven
def test_noise_depends_on_its_place_alone(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """Noise is the same in any batch, on every row, and whatever else is frozen."""
    config = data.draw(configs(circuit_model, freeze_type=st.just("noise")), label="config")
    batch = data.draw(batches(circuit_model), label="batch")
    circuit_record.observe(check_noise_depends_on_its_place_alone(circuit_engine, circuit_model, config, batch))
