"""The same layers and heads, named in another way, are the same freeze."""

from __future__ import annotations

from hypothesis import strategies as st
from transformers import PreTrainedModel

from pytest_circuitfreeze.engines import Engine
from pytest_circuitfreeze.results import CircuitRecord
from pytest_circuitfreeze.strategies import attending_layers, batches, configs, head_indices, heads_by_layer
from pytest_circuitfreeze.suites.properties import proven
from pytest_circuitfreeze.suites.selecting import check_indices_are_read_as_in_python


@proven
def test_indices_are_read_as_in_python(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """Indices may count from the end; no heads are all heads, no layers all that have attention."""
    one_layer = attending_layers(circuit_model, most=1)
    heads = head_indices(min(heads_by_layer(circuit_model).values()))
    config = data.draw(configs(circuit_model, layers=one_layer, heads=heads), label="config")
    batch = data.draw(batches(circuit_model), label="batch")
    circuit_record.observe(check_indices_are_read_as_in_python(circuit_engine, circuit_model, config, batch))
