"""A vector is in force or it is an error, whatever else is done to the layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from steered import IDS, logits, vector_of
from torch import Tensor
from transformers import DynamicCache

from freeze_core import CircuitFreezeError, FreezeNotInForceError, InterventionError
from pytest_circuitfreeze.models import tiny_model


def test_a_vector_that_something_took_out_is_an_error() -> None:
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    layer, vector = model.model.layers[1], vector_of(model)
    steered = vector.apply(model)
    model.model.layers[1] = other.model.layers[1]
    with pytest.raises(FreezeNotInForceError, match=r"layers\.1 of LlamaModel was wrapped or replaced"):
        model(IDS)
    model.model.layers[1] = layer
    standing = layer.forward
    layer.forward = type(layer).forward.__get__(layer)
    with pytest.raises(FreezeNotInForceError, match=r"layers\.1 of LlamaModel was wrapped or replaced"):
        model(IDS)
    layer.forward = lambda *args, **kwargs: standing(*args, **kwargs)
    logits(model)  # what is on top runs it
    with pytest.raises(CircuitFreezeError, match="replaced again"):
        steered.remove()
    with pytest.raises(CircuitFreezeError, match="replaced again"):
        vector.apply(model)
    layer.forward = lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs)
    with pytest.raises(FreezeNotInForceError, match=r"wrapped or replaced"):
        model(IDS)
    layer.forward = standing
    steered.remove()
    assert "forward" not in vars(layer)


def test_an_undone_vector_is_told_when_it_is_removed() -> None:
    model = tiny_model("llama")
    steered = vector_of(model).apply(model)
    for module in (model.model.layers[1], model.model):
        module.forward = type(module).forward.__get__(module)
    logits(model)
    with pytest.raises(FreezeNotInForceError, match=r"layers\.1 of LlamaModel: something else had put the forwards"):
        steered.remove()


def test_a_layer_that_is_run_by_itself_is_steered_or_refused() -> None:
    model = tiny_model("gpt2")
    vector, hidden = vector_of(model), torch.randn(2, 7, 32)
    layer = model.transformer.h[1]
    expected = layer(hidden) + vector.vector
    with vector.apply(model):
        assert torch.equal(layer(hidden), expected)
        with pytest.raises(FreezeNotInForceError, match=r"h\.1 of GPT2Model is run with a cache"):
            layer(hidden, DynamicCache())
    for positions in ("last", [0], range(3)):
        with vector.apply(model, positions=positions), pytest.raises(InterventionError, match="was run by itself"):
            layer(hidden)


def test_a_layer_that_runs_several_times_in_a_pass_is_an_error() -> None:
    model = tiny_model("llama")
    first, second = model.model.layers[1], model.model.layers[2]
    own = second.forward

    def again(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return own(first(hidden, *args, **kwargs), *args, **kwargs)

    vector = vector_of(model)
    second.forward = again
    with vector.apply(model), pytest.raises(InterventionError, match=r"layers\.1 .* runs several times in one pass"):
        logits(model)
