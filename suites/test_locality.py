"""Other heads, layers, positions and rows do not notice."""

from __future__ import annotations

from hypothesis import strategies as st
from transformers import PreTrainedModel

from pytest_circuitfreeze.engines import Engine
from pytest_circuitfreeze.results import CircuitRecord
from pytest_circuitfreeze.strategies import batches, configs, configs_without_statistics, heads_by_layer, in_both_scopes
from pytest_circuitfreeze.suites.locality import (
    check_earlier_layers_are_untouched,
    check_later_tokens_do_not_matter,
    check_other_heads_are_untouched,
    check_rows_do_not_matter,
    check_the_rest_is_untouched,
)
from pytest_circuitfreeze.suites.properties import proven
from pytest_circuitfreeze.suites.several import observe_each


@proven
def test_other_heads_are_untouched(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """Heads that read nothing frozen give what they gave."""
    batch = data.draw(batches(circuit_model), label="batch")
    several = data.draw(in_both_scopes(configs(circuit_model, batch=batch)), label="configs")
    observe_each(
        circuit_record,
        lambda config: check_other_heads_are_untouched(circuit_engine, circuit_model, config, batch),
        several,
    )


@proven
def test_earlier_layers_are_untouched(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """Layers before the first frozen one are untouched, bit for bit."""
    batch = data.draw(batches(circuit_model), label="batch")
    attending = sorted(heads_by_layer(circuit_model))
    late = st.sampled_from(attending[1:] or attending).map(lambda layer: [layer])  # nothing is before the first
    config = data.draw(configs(circuit_model, batch=batch, layers=late), label="config")
    circuit_record.observe(check_earlier_layers_are_untouched(circuit_engine, circuit_model, config, batch))


@proven
def test_later_tokens_do_not_matter(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """No position depends on later tokens, statistics of the pass aside."""
    config = data.draw(configs_without_statistics(circuit_model), label="config")
    batch = data.draw(batches(circuit_model, tokens=st.integers(2, 12)), label="batch")
    column = data.draw(st.integers(1, batch.input_ids.shape[1] - 1), label="column")
    circuit_record.observe(check_later_tokens_do_not_matter(circuit_engine, circuit_model, config, batch, column))


@proven
def test_rows_do_not_matter(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """No row depends on the others, statistics of the pass aside."""
    config = data.draw(configs_without_statistics(circuit_model), label="config")
    batch = data.draw(batches(circuit_model, rows=st.integers(2, 3)), label="batch")
    circuit_record.observe(check_rows_do_not_matter(circuit_engine, circuit_model, config, batch))


@proven
def test_the_rest_is_untouched(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """Handed the z of a frozen pass, the unfrozen model gives its logits, and its gradients behind the freeze."""
    batch = data.draw(batches(circuit_model), label="batch")
    config = data.draw(configs(circuit_model, batch=batch), label="config")
    circuit_record.observe(check_the_rest_is_untouched(circuit_engine, circuit_model, config, batch))
