"""A freeze under lower precision, without autograd's records, and where training runs layers twice."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_freeze import FREEZER, IDS, agrees, config_of, frozen_logits, logits, plain, without_heads
from torch import Tensor

from pytest_circuitfreeze.models import tiny_model

NAMES = ("gpt2", "llama_gqa", "falcon_mqa")
LOW = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", NAMES)
def test_low_precision(name: str, dtype: torch.dtype, attn: str) -> None:
    """Freezing zero is bit for bit the model without those weights."""
    model = tiny_model(name, attn=attn, dtype=dtype)
    twin = without_heads(name, tiny_model(name, attn=attn, dtype=dtype))
    frozen = frozen_logits(model, config_of("zero", model))
    assert frozen.dtype == dtype
    assert torch.equal(frozen, logits(twin))
    assert not torch.equal(frozen, logits(model))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", NAMES)
def test_autocast(name: str, dtype: torch.dtype) -> None:
    """Activations and parameters differ in dtype: freezing zero is bit for bit the model without those weights."""

    def autocast(model: Any) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return logits(model)

    model, twin = tiny_model(name), without_heads(name, tiny_model(name))
    frozen = frozen_logits(model, config_of("zero", model), lambda: autocast(model))
    assert torch.equal(frozen, autocast(twin))
    assert not torch.equal(frozen, autocast(model))


@pytest.mark.parametrize("freeze_type", ["mean", "noise", "reference", "resample"])
@pytest.mark.parametrize("name", NAMES)
def test_float16_is_within_its_rounding(name: str, freeze_type: str) -> None:
    """What float16 and autocast to it make of the other freeze types is what rounding allows, and no unfrozen model."""
    config, wanted = plain(name, freeze_type, rounding=torch.float16)
    low, full = tiny_model(name, dtype=torch.float16), tiny_model(name)
    agrees(frozen_logits(low, config), logits(low), wanted)

    def autocast() -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            return logits(full)

    agrees(frozen_logits(full, config, autocast), autocast(), wanted)


@pytest.mark.parametrize("freeze_type", ["zero", "mean", "noise", "reference", "resample"])
@pytest.mark.parametrize("name", NAMES)
def test_inference_mode(name: str, freeze_type: str) -> None:
    config, wanted = plain(name, freeze_type)
    model = tiny_model(name)

    def infer() -> Tensor:
        with torch.inference_mode():
            output: Tensor = model(IDS, use_cache=False).logits
        return output

    agrees(frozen_logits(model, config, infer), infer(), wanted)
    agrees(frozen_logits(model, config), logits(model), wanted)  # nothing of inference mode stays behind


def training(name: str) -> Any:
    """The tiny model in training mode; none drops anything, so that two passes can be compared."""
    model = tiny_model(name).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def gradients(model: Any) -> list[Tensor]:
    """Of the mean square of the logits, with respect to each parameter."""
    return backward(model, model(IDS, use_cache=False).logits.square().mean())


def backward(model: Any, loss: Tensor) -> list[Tensor]:
    """Through `backward`, since reentrant checkpointing serves nothing else; leaves no gradient behind."""
    loss.backward()
    found = [torch.zeros_like(one) if one.grad is None else one.grad for one in model.parameters()]
    model.zero_grad(set_to_none=True)
    return found


def checkpoint(model: Any, use_reentrant: bool) -> None:
    with warnings.catch_warnings():
        # It has a newer name, which not every version that is served has.
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})


def frozen_gradients(model: Any, config: Any, call: Callable[[Any], list[Tensor]] = gradients) -> list[Tensor]:
    with FREEZER.freeze_circuits(model, config):
        return call(model)


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("mode", ["stopgrad", "ste", "circuit_ste"])
@pytest.mark.parametrize("freeze_type", ["zero", "mean", "noise", "reference", "resample"])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing(name: str, use_reentrant: bool, freeze_type: str, mode: str) -> None:
    """Layers that run again in the backward pass are frozen alike: every gradient is bit for bit that without it."""
    model = training(name)
    config = config_of(freeze_type, model, kv_scope="head", backward_mode=mode)
    unfrozen, wanted = gradients(model), frozen_gradients(model, config)
    checkpoint(model, use_reentrant)
    assert same(gradients(model), unfrozen)
    assert same(frozen_gradients(model, config), wanted)
    assert not same(wanted, unfrozen)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_two_checkpointed_passes_outstanding(use_reentrant: bool) -> None:
    """Each is run again as the pass that it was, though another one came after it."""
    model = training("llama_gqa")
    config = config_of("mean", model)
    mask = torch.ones_like(IDS)
    mask[:, :3] = 0

    def both(model: Any) -> list[Tensor]:
        passes = [model(IDS, attention_mask=each, use_cache=False).logits for each in (mask, None)]
        return backward(model, sum(one[:, 3:].square().mean() for one in passes))

    wanted = frozen_gradients(model, config, both)
    checkpoint(model, use_reentrant)
    assert same(frozen_gradients(model, config, both), wanted)
    assert not same(both(model), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_training_mode(name: str) -> None:
    """Dropout apart, training is no other freeze, and the flags are left as they were."""
    config, wanted = plain(name, "mean")
    model = training(name)
    agrees(frozen_logits(model, config), logits(model), wanted)
    assert all(module.training for module in model.modules())
