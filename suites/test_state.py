"""A freeze keeps its hands off what is not its own."""

from __future__ import annotations

from hypothesis import strategies as st
from transformers import PreTrainedModel

from pytest_circuitfreeze.engines import Engine
from pytest_circuitfreeze.results import CircuitRecord
from pytest_circuitfreeze.strategies import batches, configs, freeze_types
from pytest_circuitfreeze.suites.properties import proven
from pytest_circuitfreeze.suites.state import (
    check_changed_configs_do_not_matter,
    check_generators_are_untouched,
    check_inputs_are_not_written_to,
    check_parameters_are_untouched,
)


@proven
def test_parameters_are_untouched(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """While a freeze is on, parameters and training flags are the unfrozen model's."""
    batch = data.draw(batches(circuit_model), label="batch")
    config = data.draw(configs(circuit_model, batch=batch), label="config")
    training = data.draw(st.booleans(), label="training")
    circuit_record.observe(check_parameters_are_untouched(circuit_engine, circuit_model, config, batch, training))


@proven
def test_generators_are_untouched(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """A freeze neither moves torch's generators nor depends on them."""
    batch = data.draw(batches(circuit_model), label="batch")
    # Noise for the most part, since it is what is drawn.
    kinds = st.one_of(st.just("noise"), freeze_types(batch))
    config = data.draw(configs(circuit_model, batch=batch, freeze_type=kinds), label="config")
    circuit_record.observe(check_generators_are_untouched(circuit_engine, circuit_model, config, batch))


@proven
def test_inputs_are_not_written_to(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """A frozen pass writes to no tensor that others hold."""
    batch = data.draw(batches(circuit_model), label="batch")
    config = data.draw(configs(circuit_model, batch=batch), label="config")
    circuit_record.observe(check_inputs_are_not_written_to(circuit_engine, circuit_model, config, batch))


@proven
def test_changed_configs_do_not_matter(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """A live freeze does not follow its config when that is changed."""
    batch = data.draw(batches(circuit_model), label="batch")
    config = data.draw(configs(circuit_model, batch=batch), label="config")
    circuit_record.observe(check_changed_configs_do_not_matter(circuit_engine, circuit_model, config, batch))
