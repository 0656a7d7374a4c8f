"""What a vector leaves behind: nothing, whatever was raised and in whatever order it goes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import ExitStack
from itertools import permutations
from typing import Any

import pytest
import torch
from steered import DEFAULT, FREEZER, IDS, logits, state, vector_of

from freeze_core import CircuitFreezeError, InterventionConfig, InterventionError
from pytest_circuitfreeze.models import tiny_model


@pytest.mark.parametrize("architecture", DEFAULT)
@pytest.mark.parametrize("raising", ["nothing", "body", "forward", "pass"])
def test_nothing_is_left_after_removal(architecture: str, raising: str) -> None:
    model = tiny_model(architecture).train()
    vector = vector_of(model.eval())
    before, clean = state(model), logits(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    drawn, flags = torch.get_rng_state(), [module.training for module in model.modules()]
    try:
        with vector.apply(model, 2.0, [0, 3]):
            assert model.state_dict().keys() == weights.keys()
            if raising == "body":
                raise KeyError
            logits(model)
            if raising == "forward":
                model(IDS + 10_000)
            if raising == "pass":
                logits(model, IDS[:, :2])  # which has no column 3
    except (KeyError, IndexError, InterventionError):
        assert raising != "nothing"
    else:
        assert raising == "nothing"
    assert state(model) == before
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(logits(model), clean)


def test_what_others_hold_is_not_written_to() -> None:
    model = tiny_model("llama")
    vector = vector_of(model)
    layer, held = model.model.layers[1], []
    own = layer.forward

    def keeping(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        held.append((output, output.clone()))
        return output

    layer.forward = keeping
    mine = vector.vector.clone()
    with vector.apply(model, positions="last"), vector.apply(model):
        logits(model)
    assert torch.equal(*held[0])
    assert torch.equal(vector.vector, mine)
    with vector.apply(model):
        expected = logits(model)
        vector.vector.zero_()  # a live vector is not changed by this
        assert torch.equal(logits(model), expected)
    assert layer.forward is keeping


def test_a_copy_of_a_steered_model_is_an_error() -> None:
    model = tiny_model("gpt2")
    with vector_of(model).apply(model):
        for copied in (copy.deepcopy, pickle.dumps):
            with pytest.raises(CircuitFreezeError, match=r"cannot be copied or pickled"):
                copied(model)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


@pytest.mark.parametrize("architecture", DEFAULT)
def test_several_vectors_and_freezes_compose_and_leave_in_any_order(architecture: str) -> None:
    """Each two that are left are what they are by themselves, whatever was between."""
    model = tiny_model(architecture)
    one, two, other = vector_of(model, 1, 1), vector_of(model, 1, 2), vector_of(model, 0, 3)
    config = InterventionConfig([1], [0, 2], "ov", freeze_type="mean")
    making: dict[str, Callable[[], Any]] = {
        "one": lambda: one.apply(model, 2.0),
        "two": lambda: two.apply(model, -1.0, "last"),
        "other": lambda: other.apply(model, 0.5, [2]),
        "freeze": lambda: FREEZER.freeze_circuits(model, config),
    }
    before, clean = state(model), logits(model)
    alone = {}
    for left in ({name} for name in making):
        with ExitStack() as stack:
            for name in left:
                stack.enter_context(making[name]())
            alone[frozenset(left)] = logits(model)
    assert len({str(value) for value in alone.values()}) == len(making)
    for order in permutations(making):
        live = {name: made() for name, made in making.items()}
        for place, name in enumerate(order):
            live[name].remove()
            live[name].remove()  # twice is harmless
            left = frozenset(order[place + 1 :])
            if len(left) == 1:
                assert torch.equal(logits(model), alone[left])
        assert state(model) == before
    assert torch.equal(logits(model), clean)


def test_a_vector_is_neither_put_in_nor_taken_out_in_a_running_pass() -> None:
    model = tiny_model("gpt2")
    vector = vector_of(model)
    steered = vector.apply(model)
    for change in (steered.remove, lambda: vector.apply(model)):
        hook = model.transformer.h[0].register_forward_hook(lambda *given, change=change: change())
        with pytest.raises(CircuitFreezeError, match="a pass is running"):
            logits(model)
        hook.remove()
    steered.remove()
