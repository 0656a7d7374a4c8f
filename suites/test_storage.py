"""The same weights stored otherwise give the same."""

from __future__ import annotations

from hypothesis import strategies as st
from transformers import PreTrainedModel

from pytest_circuitfreeze.engines import Engine
from pytest_circuitfreeze.results import CircuitRecord
from pytest_circuitfreeze.strategies import batches, configs
from pytest_circuitfreeze.suites.judge.equivalent_models import equivalent_models
from pytest_circuitfreeze.suites.properties import proven
from pytest_circuitfreeze.suites.storage import check_storage_does_not_matter


@proven
def test_storage_does_not_matter(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """Fused or separate, the same weights give the same outputs and gradients under the same freeze."""
    twin = data.draw(st.sampled_from(equivalent_models(circuit_model)), label="twin")
    scopes = ["group", "head"] if twin.unshares else ["group"]
    batch = data.draw(batches(circuit_model), label="batch")
    config = data.draw(configs(circuit_model, batch=batch, kv_scope=st.sampled_from(scopes)), label="config")
    circuit_record.observe(check_storage_does_not_matter(circuit_engine, circuit_model, twin, config, batch))
