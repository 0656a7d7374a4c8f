"""QK and OV are frozen apart from each other."""

from __future__ import annotations

from hypothesis import strategies as st
from transformers import PreTrainedModel

from pytest_circuitfreeze.engines import Engine
from pytest_circuitfreeze.results import CircuitRecord
from pytest_circuitfreeze.strategies import batches, configs
from pytest_circuitfreeze.suites.independence import (
    check_order_does_not_matter,
    check_ov_leaves_qk,
    check_qk_leaves_ov,
)
from pytest_circuitfreeze.suites.judge.observed_passes import pads_under_eager
from pytest_circuitfreeze.suites.properties import proven


@proven
def test_qk_leaves_ov(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """Freezing QK leaves values, and the patterns of heads that read nothing of it."""
    batch = data.draw(batches(circuit_model, padding=pads_under_eager(circuit_model)), label="batch")
    config = data.draw(configs(circuit_model, batch=batch, circuit=st.sampled_from(["qk", "q", "k"])), label="config")
    circuit_record.observe(check_qk_leaves_ov(circuit_engine, circuit_model, config, batch))


@proven
def test_ov_leaves_qk(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """Freezing OV leaves queries, keys and every pattern."""
    batch = data.draw(batches(circuit_model, padding=pads_under_eager(circuit_model)), label="batch")
    config = data.draw(configs(circuit_model, batch=batch, circuit=st.sampled_from(["ov", "v"])), label="config")
    circuit_record.observe(check_ov_leaves_qk(circuit_engine, circuit_model, config, batch))


@proven
def test_order_does_not_matter(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """Freezing QK, then OV is freezing OV, then QK, and is freezing both."""
    batch = data.draw(batches(circuit_model), label="batch")
    config = data.draw(configs(circuit_model, batch=batch), label="config")
    circuit_record.observe(check_order_does_not_matter(circuit_engine, circuit_model, config, batch))
