"""The frozen activation `x' = x + a (r - x)` and what its gradient is.

`stopgrad`: `dx = (1 - a) dx'`, which autograd gives by itself, exact zeros at `a = 1`, and the parameters behind `x`
keep gradients that are not `None`. `ste`, the straight-through estimator: `dx = dx'`. `circuit_ste` has its gradient
where the heads' values are mixed, not here. Derivatives in forward mode are those in reverse mode.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from freeze_core.vocabulary import BackwardMode

__all__ = ["blend", "differentiated", "straight_through"]


def blend(x: Tensor, frozen: Tensor, mask: Tensor, r: Tensor, strength: float, mode: BackwardMode) -> Tensor:
    """`frozen` with the features in `mask` replaced by `x + strength * (r - x)`.

    Args:
        x: the activation before any freeze `[batch, token, feature]`.
        frozen: the activation as earlier freezes left it; where `mask` is true it is still `x`.
        mask: `[feature]` bool.
        r: replacement, broadcastable to `x`; cast to its dtype, so that at strength 1 the result is `r` itself.
        strength: in (0, 1].
        mode: what the gradient does.
    """
    if r.dtype != x.dtype:
        r = r.to(x.dtype)
    if strength != 1:
        r = x.lerp(r.to(x.device), strength)
    # Chosen, not multiplied: a product with 0 would keep inf and nan alive.
    result = torch.where(mask, r, frozen)
    return straight_through(frozen, result) if mode == BackwardMode.STE else result


def differentiated() -> bool:
    """Whether derivatives may be taken of what is computed now, in reverse mode or in forward mode.

    `torch.no_grad()` ends the first alone: a tangent (`torch.autograd.forward_ad`, `torch.func.jvp`) passes it.
    """
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """`value`, bit for bit, with the derivative as if it had been `x`, in forward and in reverse mode."""
    value = value.detach()
    if not differentiated():
        return value
    if torch.compiler.is_compiling():
        # TorchDynamo traces neither a `jvp` nor a vmap rule of an autograd function, so there it is ordinary
        # arithmetic. Subtracted, not added: -0.0 + 0.0 is 0.0. Where `x` is inf or nan, it has no derivative.
        return value - torch.where(x.isfinite(), x.detach() - x, 0)
    return cast(Tensor, _StraightThrough.apply(x, value))  # type: ignore[no-untyped-call]  # apply is torch's


class _StraightThrough(torch.autograd.Function):
    """In the form that every transform of `torch.func` takes: `forward` has no context, and there is a `jvp`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Keeps nothing: neither derivative depends on a value."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Tensor | None) -> Tensor:
        return tangent
