"""A frozen KV head reaches the query heads that read it, and no other."""

from __future__ import annotations

from hypothesis import strategies as st
from transformers import PreTrainedModel

from pytest_circuitfreeze.engines import Engine
from pytest_circuitfreeze.results import CircuitRecord
from pytest_circuitfreeze.strategies import batches, configs
from pytest_circuitfreeze.suites.grouping import (
    check_frozen_queries_and_keys_reach_their_readers,
    check_frozen_values_reach_their_readers,
)
from pytest_circuitfreeze.suites.properties import proven


@proven
def test_frozen_values_reach_their_readers(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """Frozen values reach exactly the heads that read them: the group, or the chosen head."""
    config = data.draw(
        configs(
            circuit_model, circuit=st.sampled_from(["ov", "v"]), freeze_type=st.just("zero"), strength=st.just(1.0)
        ),
        label="config",
    )
    batch = data.draw(batches(circuit_model), label="batch")
    circuit_record.observe(check_frozen_values_reach_their_readers(circuit_engine, circuit_model, config, batch))


@proven
def test_frozen_queries_and_keys_reach_their_readers(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """Frozen queries reach their head alone, frozen keys exactly the heads that read them."""
    config = data.draw(
        configs(
            circuit_model, circuit=st.sampled_from(["q", "k", "qk"]), freeze_type=st.just("zero"), strength=st.just(1.0)
        ),
        label="config",
    )
    batch = data.draw(batches(circuit_model, tokens=st.integers(2, 12), padding=False), label="batch")
    circuit_record.observe(
        check_frozen_queries_and_keys_reach_their_readers(circuit_engine, circuit_model, config, batch)
    )
