"""A vector that is added does to a pass what a hook by hand does, bit for bit."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from cache_names import CACHE
from steered import DEFAULT, FREEZER, IDS, LEFT, RIGHT, by_hand, logits, vector_of
from torch import Tensor
from transformers import DynamicCache

from freeze_core import FreezeNotInForceError, InterventionConfig, InterventionError
from freeze_core.vectors.sites import find_residual, stream_of
from pytest_circuitfreeze.models import TINY, tiny_model


@pytest.mark.parametrize("architecture", sorted(TINY))
def test_every_architecture_is_steered_as_by_a_hook_by_hand(architecture: str) -> None:
    model = tiny_model(architecture)
    vector = vector_of(model)
    clean = logits(model)
    with vector.apply(model, strength=1.5):
        steered = logits(model)
    assert torch.equal(steered, by_hand(model, 1, lambda x: x + 1.5 * vector.vector))
    assert not torch.equal(steered, clean)
    assert torch.equal(logits(model), clean)


@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize("strength", [-0.5, 1, 3.0])
@pytest.mark.parametrize("architecture", DEFAULT)
def test_strengths_and_layers_are_those_of_a_hook_by_hand(architecture: str, strength: float, layer: int) -> None:
    model = tiny_model(architecture)
    vector = vector_of(model, layer)
    with vector.apply(model, strength):
        steered = logits(model)
    assert torch.equal(steered, by_hand(model, layer, lambda x: x + strength * vector.vector))


def test_the_stream_after_the_last_layer_is_that_before_the_final_norm() -> None:
    model = tiny_model("llama")
    vector = vector_of(model, -1)
    seen = []
    hook = model.model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits(model)
    hook.remove()
    with vector.apply(model, 2.0), torch.no_grad():
        expected = model.lm_head(model.model.norm(seen[0] + 2 * vector.vector))
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("architecture", DEFAULT)
def test_strength_0_is_bit_for_bit_the_unsteered_model(architecture: str) -> None:
    model = tiny_model(architecture)
    vector = vector_of(model)
    clean, cache = logits(model), DynamicCache()
    with torch.no_grad():
        model(IDS[:, :4], **{CACHE: cache})
    with vector.apply(model, 0.0), warnings.catch_warnings():
        warnings.simplefilter("error")  # a cache that was filled without it is as good
        assert torch.equal(logits(model), clean)
        with torch.no_grad():
            model(IDS[:, 4:], **{CACHE: cache})
    layer = find_residual(model, 1).module
    own = layer.forward

    def negative_zeros(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        zeros = -0.0 * stream_of(output, "layer").abs()
        return (zeros, *output[1:]) if isinstance(output, tuple) else zeros

    layer.forward = negative_zeros  # adding 0 would lose the sign
    seen: list[Tensor] = []
    with vector.apply(model, 0.0):
        hook = layer.register_forward_hook(lambda module, args, output: seen.append(stream_of(output, "layer")))
        logits(model)
        hook.remove()
    assert bool(seen[0].signbit().all())


def test_vectors_after_one_layer_are_added_in_order() -> None:
    model = tiny_model("falcon_mqa")
    one, two = vector_of(model, 1, 1), vector_of(model, 1, 2)
    with one.apply(model, 2.0), two.apply(model, -1.0):
        steered = logits(model)
    assert torch.equal(steered, by_hand(model, 1, lambda x: x + 2.0 * one.vector - two.vector))


@pytest.mark.parametrize("first", ["vector", "freeze"])
def test_a_vector_beside_a_freeze_is_a_hook_beside_a_freeze(first: str) -> None:
    model = tiny_model("mistral_gqa")
    vector, config = vector_of(model, 0), InterventionConfig([0, 1], [1], "qk", kv_scope="head")
    with FREEZER.freeze_circuits(model, config):
        expected = by_hand(model, 0, lambda x: x + vector.vector)
    with ExitStack() as stack:
        if first == "vector":
            stack.enter_context(vector.apply(model))
        stack.enter_context(FREEZER.freeze_circuits(model, config))
        if first == "freeze":
            stack.enter_context(vector.apply(model))
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_are_those_of_a_hook_also_when_layers_are_run_again(reentrant: bool) -> None:
    model = tiny_model("llama_gqa").train()
    vector = vector_of(model)
    model.enable_input_require_grads()

    def gradients() -> list[Tensor | None]:
        model.zero_grad()
        model(IDS, attention_mask=LEFT).logits.square().mean().backward()
        return [parameter.grad for parameter in model.parameters()]

    hook = model.model.layers[1].register_forward_hook(lambda module, args, output: output + vector.vector)
    expected = gradients()
    hook.remove()
    model._set_gradient_checkpointing(
        True, lambda *args, **options: torch.utils.checkpoint.checkpoint(*args, use_reentrant=reentrant, **options)
    )
    with vector.apply(model):
        assert all(torch.equal(one, other) for one, other in zip(gradients(), expected, strict=True))
        loss = model(IDS, attention_mask=LEFT).logits.square().mean()
    with pytest.raises(FreezeNotInForceError, match="runs a layer again under other freezes"):
        loss.backward()


@pytest.mark.filterwarnings(
    "ignore:.torch.jit:DeprecationWarning", "ignore:.*should not be instantiated:DeprecationWarning"
)
@pytest.mark.parametrize("positions", ["all", "last", [4, 6], range(1, 9)], ids=str)
def test_a_model_that_was_compiled_before_is_steered(positions: Any) -> None:
    model = tiny_model("llama_gqa")
    vector = vector_of(model)
    torch.compiler.reset()
    traced = torch.compile(model, backend="eager", fullgraph=True)
    clean = logits(traced, attention_mask=LEFT)
    with vector.apply(model, positions=positions):
        steered = logits(traced, attention_mask=LEFT)
        assert torch.equal(steered, logits(model, attention_mask=LEFT))
        if positions == [4, 6]:
            with pytest.raises(InterventionError, match="padding in some row"):
                logits(traced, attention_mask=RIGHT)
    assert not torch.equal(steered, clean)
    assert torch.equal(logits(traced, attention_mask=LEFT), clean)
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_streams_dtype_is_kept(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype)
    vector = vector_of(model)
    assert vector.vector.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    with vector.apply(model, 0.5):
        steered = logits(model)
    assert steered.dtype == dtype
    assert torch.equal(steered, by_hand(model, 1, lambda x: x + (0.5 * vector.vector).to(dtype)))
