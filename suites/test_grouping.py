"""A frozen KV head reaches the query heads that read it, and no other."""

from __future__ import annotations

from hypothesis import strategies as st
from transformers import PreTrainedModel

from freeze_core import InterventionConfig
from pytest_circuitfreeze.engines import Engine
from pytest_circuitfreeze.results import CircuitRecord
from pytest_circuitfreeze.stated import STATED
from pytest_circuitfreeze.strategies import batches, configs, in_both_scopes
from pytest_circuitfreeze.suites.grouping import (
    check_frozen_queries_and_keys_reach_their_readers,
    check_frozen_values_reach_their_readers,
)
from pytest_circuitfreeze.suites.properties import proven
from pytest_circuitfreeze.suites.several import observe_each


@st.composite
def zeroed(draw: st.DrawFn, model: PreTrainedModel, circuits: list[str]) -> list[InterventionConfig]:
    """A freeze of each of `circuits` to zero, in both scopes, or the one that is stated."""
    kind, strength = st.just("zero"), st.just(1.0)
    if STATED.get() is not None:
        return [draw(configs(model, circuit=st.sampled_from(circuits), freeze_type=kind, strength=strength))]
    each = (configs(model, circuit=st.just(circuit), freeze_type=kind, strength=strength) for circuit in circuits)
    return [config for one in each for config in draw(in_both_scopes(one))]


@proven
def test_frozen_values_reach_their_readers(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """Frozen values reach exactly the heads that read them: the group, or the chosen head."""
    several = data.draw(zeroed(circuit_model, ["ov", "v"]), label="configs")
    batch = data.draw(batches(circuit_model), label="batch")
    observe_each(
        circuit_record,
        lambda config: check_frozen_values_reach_their_readers(circuit_engine, circuit_model, config, batch),
        several,
    )


@proven
def test_frozen_queries_and_keys_reach_their_readers(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """Frozen queries reach their head alone, frozen keys exactly the heads that read them."""
    several = data.draw(zeroed(circuit_model, ["q", "k", "qk"]), label="configs")
    batch = data.draw(batches(circuit_model, tokens=st.integers(2, 12), padding=False), label="batch")
    observe_each(
        circuit_record,
        lambda config: check_frozen_queries_and_keys_reach_their_readers(circuit_engine, circuit_model, config, batch),
        several,
    )
