"""The frozen activation `x' = x + a (r - x)` and what its gradient is.

`stopgrad`: `dx = (1 - a) dx'`, which autograd gives by itself, exact zeros at `a = 1`, and the parameters behind `x`
keep gradients that are not `None`. `ste`, the straight-through estimator: `dx = dx'`. `circuit_ste` has its gradient
where the heads' values are mixed, not here.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from freeze_core.vocabulary import BackwardMode

__all__ = ["blend", "straight_through"]


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


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """`value`, bit for bit, with the gradient going to `x` as if it had been that."""
    if not x.requires_grad:
        return value.detach()
    return cast(Tensor, _StraightThrough.apply(x, value.detach()))  # type: ignore[no-untyped-call]  # apply is torch's


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
