"""Malformed configs and calls, thousands of them: each refused by name, none accepted, and the model as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from functools import cache
from types import GeneratorType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freeze_core import (
    AttentionCircuitFreezer,
    CircuitFreezeError,
    ExperimentalInterventions,
    InterventionConfig,
    freeze_ov_circuit,
    freeze_qk_circuit,
)
from freeze_core.errors import shown
from freeze_core.statistics import ActivationStatistics
from pytest_circuitfreeze.models import tiny_model
from pytest_circuitfreeze.suites.judge.visible_state import changes, visible_state

FREEZER = AttentionCircuitFreezer()
EXPERIMENTS = ExperimentalInterventions()
LAYERS, HEADS = 3, 4
IDS = torch.arange(14).view(2, 7)


@cache
def model(name: str):
    return tiny_model(name)


texts = st.text(max_size=12)
OTHERS = [object(), object, len, torch.zeros(2), np.zeros(2), ..., NotImplemented, b"qk", b"", (x for x in "a")]
KINDS: dict[type, st.SearchStrategy[Any]] = {
    type(None): st.none(),
    bool: st.booleans(),
    str: texts,
    int: st.integers(),
    float: st.floats(),
    complex: st.complex_numbers(),
    Decimal: st.decimals(),
    Fraction: st.fractions(),
    dict: st.dictionaries(texts, st.integers(), max_size=2),
    set: st.sets(st.integers(), max_size=3),
    list: st.lists(texts, max_size=2),
}


def not_a(*allowed: type) -> st.SearchStrategy[Any]:
    """Anything but these types, and numbers that pass for them."""
    kinds = [values for kind, values in KINDS.items() if kind not in allowed and not (kind is bool and int in allowed)]
    return st.one_of(*kinds, st.sampled_from([other for other in OTHERS if not isinstance(other, allowed)]))


things = not_a()


def indices(size: int) -> st.SearchStrategy[object]:
    """What chooses no layers or heads out of `size`."""
    inside = st.integers(-size, size - 1)
    outside = st.one_of(st.integers(max_value=-size - 1), st.integers(min_value=size))
    no_index = st.one_of(st.booleans(), st.none(), texts, st.floats(), st.decimals(), st.just(np.float32(1)))

    def among(strange: st.SearchStrategy[object]) -> st.SearchStrategy[list[object]]:
        pieces = st.tuples(st.lists(inside, max_size=2), strange, st.lists(inside, max_size=2))
        return pieces.map(lambda parts: [*parts[0], parts[1], *parts[2]])

    twice = st.tuples(inside, st.booleans()).map(
        lambda drawn: [drawn[0], drawn[0] - (size if drawn[0] >= 0 else -size) if drawn[1] else drawn[0]]
    )
    return st.one_of(st.just([]), st.just(()), not_a(list, tuple, type(None)), among(no_index), among(outside), twice)


def real_outside(least: float, most: float) -> st.SearchStrategy[object]:
    """What is no finite real number from `least` to `most`."""
    off = st.floats().filter(lambda value: not (math.isfinite(value) and least <= value <= most))
    huge = st.sampled_from([10**400, -(10**400), Fraction(-1, 3), Decimal("0.5"), np.float64("nan")])
    return st.one_of(off, huge, st.booleans(), not_a(int, float, Fraction))


def words(*allowed: str) -> st.SearchStrategy[object]:
    """What is none of these words."""
    return st.one_of(texts.filter(lambda text: text not in allowed), not_a(str), st.just(allowed[0].upper()))


CONFIG: dict[str, st.SearchStrategy[object]] = {
    "layer_indices": indices(LAYERS),
    "head_indices": indices(HEADS),
    "circuit": words("qk", "ov", "both", "q", "k", "v"),
    "freeze_type": words("zero", "mean", "noise", "reference", "resample"),
    "backward_mode": words("stopgrad", "ste", "circuit_ste"),
    "kv_scope": words("group", "head"),
    "attention": words("self", "cross", "encoder"),
    "preserve_gradients": not_a(bool),
    "strength": real_outside(0, 1),
    "seed": not_a(int) | st.booleans(),
    "noise_std": real_outside(0, math.inf).filter(lambda value: value is not None),
    "statistics": not_a(type(None)),
    "reference": not_a(type(None)),
}
"""By field of `InterventionConfig`, what it must not be."""


Call = Callable[[Any, Any], object]
"""Takes a model and a value that is malformed."""


def changed_later(field: str) -> Call:
    def call(model: Any, value: object) -> object:
        config = InterventionConfig()
        setattr(config, field, value)
        return FREEZER.freeze_circuits(model, config)

    return call


def ways(field: str) -> list[Call]:
    """All places in which a field of a config can be malformed."""
    calls: list[Call] = [
        lambda model, value: FREEZER.freeze_circuits(
            model, [InterventionConfig(), InterventionConfig(**{field: value})]
        ),
        changed_later(field),
    ]
    if field != "circuit":
        calls += [
            lambda model, value: freeze_qk_circuit(model, **{**ONE_HEAD, field: value}),
            lambda model, value: freeze_ov_circuit(model, **{**ONE_HEAD, field: value}),
        ]
    if field not in ("layer_indices", "head_indices", "circuit", "kv_scope"):
        calls.append(lambda model, value: EXPERIMENTS.freeze_attention_heads(model, {0: [0]}, **{field: value}))
    return calls


ONE_HEAD: dict[str, Any] = {"layer_indices": [0], "head_indices": [0]}


inputs = st.one_of(
    st.tuples(
        st.sampled_from([(), (3,), (0, 3), (2, 0), (1, 2, 3, 4)]),
        st.sampled_from([torch.int64, torch.float32, torch.bool, torch.complex64]),
    ).map(lambda drawn: torch.zeros(drawn[0], dtype=drawn[1])),
    st.sampled_from(
        [torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 3), torch.full((1, 2), 97), torch.full((1, 2), -1)]
    ),
    not_a(torch.Tensor, dict),
    st.just({}),
    st.just({3: IDS}),
)
no_config = not_a(list, tuple) | st.just([]) | st.lists(things, min_size=1, max_size=2)
no_bool = not_a(bool)
no_stale = words("warn", "error", "ignore")
no_batches = not_a(list, tuple, set, torch.Tensor, np.ndarray, GeneratorType) | st.just([])
no_heads = st.one_of(st.just({}), not_a(dict), st.dictionaries(st.integers(3), indices(HEADS), min_size=1, max_size=2))
no_field = texts.filter(lambda text: text not in {"model", *InterventionConfig.__dataclass_fields__})
no_storage = words("separate_qkv", "fused_qkv").filter(lambda value: value is not None)
ONE = InterventionConfig([0])

CALLS: list[tuple[st.SearchStrategy[Any], Call, tuple[str, ...]]] = [
    *(
        (things, call, ("model",))
        for call in (
            lambda _, value: FREEZER.freeze_circuits(value, ONE),
            lambda _, value: FREEZER.detect_architecture(value),
            lambda _, value: FREEZER.get_model_config(value),
            lambda _, value: FREEZER.record(value, IDS),
            lambda _, value: FREEZER.calibrate(value, [IDS], progress=False),
            lambda _, value: FREEZER.recompute_cache(value, IDS),
            lambda _, value: FREEZER.check_gradient_behavior(value, IDS, ONE),
            lambda model, value: FREEZER.verify_intervention_effect(value, model, IDS, ONE),
            lambda model, value: FREEZER.verify_intervention_effect(model, value, IDS, ONE),
            lambda _, value: EXPERIMENTS.freeze_attention_heads(value, {0: [0]}),
            lambda _, value: EXPERIMENTS.check_model_compatibility(value),
        )
    ),
    *(
        (inputs, call, ("input", "run"))
        for call in (
            lambda model, value: FREEZER.record(model, value),
            lambda model, value: FREEZER.recompute_cache(model, value),
            lambda model, value: FREEZER.calibrate(model, [IDS, value], progress=False),
            lambda model, value: FREEZER.check_gradient_behavior(model, value, ONE),
            lambda model, value: FREEZER.verify_intervention_effect(model, model, value, ONE),
        )
    ),
    *(
        (no_config, call, ("config",))
        for call in (
            lambda model, value: FREEZER.freeze_circuits(model, value),
            lambda model, value: FREEZER.check_gradient_behavior(model, IDS, value),
            lambda model, value: FREEZER.verify_intervention_effect(model, model, IDS, value),
        )
    ),
    *(
        (indices(LAYERS), call, ("layer_indices",))
        for call in (
            lambda model, value: FREEZER.record(model, IDS, value),
            lambda model, value: FREEZER.calibrate(model, [IDS], value, progress=False),
        )
    ),
    (no_heads, lambda model, value: EXPERIMENTS.freeze_attention_heads(model, value), ("heads", "head_", "layer_")),
    (no_field, lambda model, value: freeze_qk_circuit(model, [0], [0], **{value: 1}), ("unknown argument",)),
    (no_storage, lambda model, value: FREEZER.freeze_circuits(model, ONE, value), ("architecture",)),
    (no_batches, lambda model, value: FREEZER.calibrate(model, value, progress=False), ("batches",)),
    (no_bool, lambda model, value: FREEZER.calibrate(model, [IDS], progress=value), ("progress",)),
    (no_bool, lambda model, value: FREEZER.record(model, IDS, pattern=value), ("pattern",)),
    (texts.map("no ".__add__), lambda model, value: FREEZER.record(model, IDS, device=value), ("device",)),
    (
        words("self", "cross", "encoder"),
        lambda model, value: FREEZER.record(model, IDS, attention=value),
        ("attention",),
    ),
    (things, lambda _, value: FREEZER.remove_hooks([value]), ("handles",)),
    (no_bool, lambda _, value: AttentionCircuitFreezer(value), ("debug_gradients",)),
    (no_stale, lambda _, value: AttentionCircuitFreezer(on_stale_cache=value), ("on_stale_cache",)),
    (no_stale, lambda _, value: ExperimentalInterventions(value), ("on_stale_cache",)),
    (things, lambda _, value: ActivationStatistics.load(value), ("statistics",)),
]
"""A value that is malformed, the call that is given it, and words of which the error has to hold one."""

CONFIGS = [(values, call, (field,)) for field, values in CONFIG.items() for call in ways(field)]


@st.composite
def malformed(draw: st.DrawFn, cases: list[tuple[st.SearchStrategy[Any], Call, tuple[str, ...]]]) -> Any:
    values, call, named = draw(st.sampled_from(cases))
    return draw(values), call, named


def refuse(value: object, call: Call, named: tuple[str, ...], name: str) -> None:
    before = visible_state(model(name))
    with pytest.raises(CircuitFreezeError) as error:
        call(model(name), value)
    message = str(error.value)
    assert any(word in message for word in named), message
    assert any(told in message for told in ways_to_tell(value)), message
    assert changes(before, visible_state(model(name))) == []


def ways_to_tell(value: object) -> Iterator[str]:
    """How a message may name a value: as it prints, by its type or shape, or by the part of it that is wrong."""
    yield from (shown(value), type(value).__name__)
    if isinstance(value, torch.Tensor):
        yield str(list(value.shape))
    if isinstance(value, list | tuple):
        yield "empty"
        yield shown(list(value))
        yield from (told for part in value for told in ways_to_tell(part))
    if isinstance(value, dict):
        yield from (shown(part) for part in value.values())
        yield from (shown([part]) for part in value)
    if isinstance(value, str):
        yield value


thorough = settings(max_examples=1200, deadline=None, derandomize=True, database=None)


@thorough
@given(drawn=malformed(CONFIGS), name=st.sampled_from(["gpt2", "llama_gqa"]))
def test_a_malformed_config_is_refused_by_field_and_value(drawn, name):
    refuse(*drawn, name)


@thorough
@given(drawn=malformed(CALLS), name=st.sampled_from(["gpt2", "llama_gqa"]))
def test_a_malformed_call_is_refused_by_argument_and_value(drawn, name):
    refuse(*drawn, name)
