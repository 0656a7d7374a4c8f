"""Resampling takes other rows."""

from __future__ import annotations

from hypothesis import strategies as st
from transformers import PreTrainedModel

from pytest_circuitfreeze.engines import Engine
from pytest_circuitfreeze.results import CircuitRecord
from pytest_circuitfreeze.strategies import seeds
from pytest_circuitfreeze.suites.properties import proven
from pytest_circuitfreeze.suites.resampling import check_resampling_takes_other_rows


@proven
def test_resampling_takes_other_rows(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """Resampling gives each row the columns of one other row, which the seed alone decides."""
    seed = data.draw(seeds(), label="seed")
    rows = data.draw(st.integers(2, 4), label="rows")
    circuit_record.observe(check_resampling_takes_other_rows(circuit_engine, circuit_model, seed, rows))
