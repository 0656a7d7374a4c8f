"""A freeze is in force however its model is called."""

from __future__ import annotations

from hypothesis import strategies as st
from transformers import PreTrainedModel

from pytest_circuitfreeze.engines import Engine
from pytest_circuitfreeze.results import CircuitRecord
from pytest_circuitfreeze.strategies import batches, configs
from pytest_circuitfreeze.suites.entering import check_every_way_in_is_frozen
from pytest_circuitfreeze.suites.properties import proven


@proven
def test_every_way_in_is_frozen(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """By position, of embeddings, beside a cache, in each mode: a freeze gives what a plain call gives."""
    batch = data.draw(batches(circuit_model), label="batch")
    # The mean of the pass half of the time: what an engine takes from the call shows there.
    mean = configs(circuit_model, freeze_type=st.just("mean"))
    config = data.draw(mean | configs(circuit_model, batch=batch), label="config")
    circuit_record.observe(check_every_way_in_is_frozen(circuit_engine, circuit_model, config, batch))
