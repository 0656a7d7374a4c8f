"""Hooks of others."""

from __future__ import annotations

from hypothesis import strategies as st
from transformers import PreTrainedModel

from pytest_circuitfreeze.engines import Engine
from pytest_circuitfreeze.results import CircuitRecord
from pytest_circuitfreeze.strategies import batches, circuits, configs
from pytest_circuitfreeze.suites.hooks import check_hooks_of_others_stay
from pytest_circuitfreeze.suites.properties import proven


@proven
def test_hooks_of_others_stay(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """Hooks that others have on a model stay there under a freeze, are called, and count."""
    batch = data.draw(batches(circuit_model), label="batch")
    # Queries for the most part: frozen keys and values leave no head that reads nothing frozen where all share them.
    config = data.draw(configs(circuit_model, batch=batch, circuit=st.one_of(st.just("q"), circuits())), label="config")
    circuit_record.observe(check_hooks_of_others_stay(circuit_engine, circuit_model, config, batch))
