"""Frozen values, to rounding."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st
from transformers import PreTrainedModel

from freeze_core import InterventionConfig
from pytest_circuitfreeze.engines import Engine
from pytest_circuitfreeze.results import CircuitRecord
from pytest_circuitfreeze.stated import STATED
from pytest_circuitfreeze.strategies import (
    Batch,
    attending_layers,
    batches,
    configs,
    configs_of_each_kind,
    head_indices,
    heads_by_layer,
    strengths,
)
from pytest_circuitfreeze.suites.claims import Margin
from pytest_circuitfreeze.suites.judge.observed_passes import pads_under_eager
from pytest_circuitfreeze.suites.judge.site_lookup import implementations
from pytest_circuitfreeze.suites.properties import proven
from pytest_circuitfreeze.suites.several import observe_each
from pytest_circuitfreeze.suites.values import (
    check_full_strength_replaces_anything,
    check_implementations_agree,
    check_values_are_the_oracles,
    check_zero_strength_is_unfrozen,
    known_beforehand,
)


@st.composite
def of_each_kind_and_size(draw: st.DrawFn, model: PreTrainedModel, batch: Batch) -> list[InterventionConfig]:
    """`configs_of_each_kind`; noise of a given size is of none at all every other time."""
    several = draw(configs_of_each_kind(model, batch))
    if STATED.get() is not None or draw(st.booleans()):
        return several
    return [one if one.noise_std is None else replace(one, noise_std=0.0) for one in several]


def in_each_backward_mode(
    strategy: st.SearchStrategy[InterventionConfig],
) -> st.SearchStrategy[list[InterventionConfig]]:
    """A config of `strategy` in each backward mode; a stated one as it is."""

    def each(config: InterventionConfig) -> list[InterventionConfig]:
        modes = ("stopgrad", "ste", "circuit_ste")
        return [config] if config is STATED.get() else [replace(config, backward_mode=mode) for mode in modes]

    return strategy.map(each)


@proven
def test_values_are_the_oracles(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """What attention consumes under a freeze is what a float64 oracle computes."""
    attn = data.draw(st.sampled_from(implementations(circuit_model)), label="attn")
    padding = attn == "sdpa" or pads_under_eager(circuit_model)
    batch = data.draw(batches(circuit_model, padding=padding), label="batch")
    several = data.draw(of_each_kind_and_size(circuit_model, batch), label="configs")

    def check(config: InterventionConfig) -> Margin:
        return check_values_are_the_oracles(circuit_engine, circuit_model, [config], batch, attn)

    observe_each(circuit_record, check, several)


@proven
def test_several_freezes_win_in_order(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """Of several freezes the later one wins where they meet, each on the unfrozen activation."""
    batch = data.draw(batches(circuit_model), label="batch")
    layers = data.draw(attending_layers(circuit_model, most=1), label="layers")
    heads = head_indices(heads_by_layer(circuit_model)[layers[0]])
    shared = st.just(data.draw(heads, label="heads"))
    # At full strength nothing of what a freeze was put on is left to see.
    partly = st.one_of(strengths(least=0.01), st.floats(0.1, 0.9))
    same = configs(circuit_model, batch=batch, layers=st.just(layers), heads=st.one_of(shared, heads), strength=partly)
    several = data.draw(st.lists(same, min_size=2, max_size=3), label="configs")
    circuit_record.observe(check_values_are_the_oracles(circuit_engine, circuit_model, several, batch))


@proven
def test_zero_strength_is_unfrozen(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """A freeze of strength 0 is the unfrozen model, bit for bit."""
    batch = data.draw(batches(circuit_model), label="batch")
    config = data.draw(configs(circuit_model, batch=batch, strength=st.just(0.0)), label="config")
    circuit_record.observe(check_zero_strength_is_unfrozen(circuit_engine, circuit_model, config, batch))


@proven
def test_full_strength_replaces_anything(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """A freeze of strength 1 leaves nothing of the activation, not even inf or nan."""
    batch = data.draw(batches(circuit_model), label="batch")
    whole = configs(circuit_model, batch=batch, strength=st.just(1.0)).filter(known_beforehand)
    several = data.draw(in_each_backward_mode(whole), label="configs")
    poison = data.draw(st.sampled_from([float("nan"), float("inf")]), label="poison")

    def check(config: InterventionConfig) -> Margin:
        return check_full_strength_replaces_anything(circuit_engine, circuit_model, config, batch, poison)

    observe_each(circuit_record, check, several)


@proven
def test_implementations_agree(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """A freeze gives the same outputs under eager and sdpa attention."""
    batch = data.draw(batches(circuit_model, padding=pads_under_eager(circuit_model)), label="batch")
    config = data.draw(configs(circuit_model, batch=batch), label="config")
    circuit_record.observe(check_implementations_agree(circuit_engine, circuit_model, config, batch))
