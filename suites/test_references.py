"""Recordings are right, and hold patterns still."""

from __future__ import annotations

from hypothesis import strategies as st
from transformers import PreTrainedModel

from pytest_circuitfreeze.engines import Engine, FreezeCore
from pytest_circuitfreeze.results import CircuitRecord
from pytest_circuitfreeze.strategies import batches, configs, references
from pytest_circuitfreeze.suites.claims import NotApplicable
from pytest_circuitfreeze.suites.judge.observed_passes import pads_under_eager
from pytest_circuitfreeze.suites.judge.site_lookup import sites
from pytest_circuitfreeze.suites.properties import proven
from pytest_circuitfreeze.suites.references import (
    check_patterns_are_the_recorded,
    check_recordings_are_what_attention_saw,
)


@proven
def test_recordings_are_what_attention_saw(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """What is recorded, for a reference, is what attention saw, bit for bit."""
    if circuit_engine.name != FreezeCore.name:
        raise NotApplicable("recordings are freeze_core's, whichever engine holds activations at them")
    batch = data.draw(batches(circuit_model), label="batch")
    layer = data.draw(st.sampled_from(sorted(sites(circuit_model))), label="layer")
    recording = data.draw(references(circuit_model, batch, [layer]), label="recording")
    circuit_record.observe(check_recordings_are_what_attention_saw(circuit_model, recording))


@proven
def test_patterns_are_the_recorded(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """A head whose queries and keys are held at a recording has the recorded pattern."""
    batch = data.draw(batches(circuit_model, padding=pads_under_eager(circuit_model)), label="batch")
    held = configs(
        circuit_model,
        batch=batch,
        circuit=st.sampled_from(["qk", "both"]),
        freeze_type=st.just("reference"),
        strength=st.just(1.0),
    )
    config = data.draw(held, label="config")
    circuit_record.observe(check_patterns_are_the_recorded(circuit_engine, circuit_model, config, batch))
