"""How far rounding alone could move what a pass gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from pytest_circuitfreeze.recordings import moved_to
from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.judge.judged_sites import CannotJudge
from pytest_circuitfreeze.suites.judge.observed_passes import Pass, run_pass
from pytest_circuitfreeze.suites.tolerance import Nudge, nudged

if TYPE_CHECKING:
    from freeze_core import InterventionConfig
    from pytest_circuitfreeze.engines import Engine

__all__ = ["NudgedAttention", "largest_change", "run_nudged_pass"]


def run_nudged_pass(
    engine: Engine,
    model: PreTrainedModel,
    config: InterventionConfig | Sequence[InterventionConfig] | None,
    batch: Batch,
    *,
    attn: str | None = None,
    patterns: bool = False,
    rounding: torch.dtype | None = None,
) -> Pass:
    """The pass that `run_pass` would see if every weight were off by rounding (`tolerance.nudged`), in `rounding`."""
    twin = nudged(model, rounding)
    if config is not None:
        config = [moved_to(one, twin) for one in (config if isinstance(config, Sequence) else [config])]
    return run_pass(engine, twin, config, batch, attn=attn, patterns=patterns)


def largest_change(exact: Tensor, moved: Tensor) -> float:
    """The largest absolute difference between what was seen and what a nudge made of it: a bound.

    Raises:
        CannotJudge: one of them is inf or nan, so that there is none.
    """
    change = float((exact.double() - moved.double()).abs().max()) if exact.numel() else 0.0
    if not math.isfinite(change):
        raise CannotJudge("the model gives inf or nan here without any freeze, so nothing can be held to a bound")
    return change


class NudgedAttention(TorchFunctionMode):
    """Nudges the backward pass of attention where that subtracts: in `scaled_dot_product_attention`, which it takes
    apart, and in the products of attention that is written out.

    The gradient of a score is `pattern * (dp - delta)`, where `delta` is the mean of `dp` under the pattern: the two
    round apart and may cancel altogether (a query that sees one key has no gradient). Nothing that is done to weights
    or to what arrives shows that, so `dp` is nudged and `delta` is not: by `gamma` of the products that `dp` is a sum
    of, since that sum may cancel too.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in PRODUCTS and not kwargs and _are_batches(*args):
            return _Product.apply(*args)  # type: ignore[no-untyped-call]  # apply is torch's
        if func in SOFTMAX and _over_the_last(*args, **(kwargs or {})):
            dtype = (kwargs or {}).get("dtype")
            return _Softmax.apply(args[0] if dtype is None else args[0].to(dtype))  # type: ignore[no-untyped-call]
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3]
        key, value = (kv.repeat_interleave(query.shape[1] // kv.shape[1], dim=1) for kv in (key, value))
        return _attention(query, key, value, **(kwargs or {}))


PRODUCTS = (torch.bmm, torch.matmul, Tensor.bmm, Tensor.matmul, Tensor.__matmul__)


SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


def _over_the_last(scores: Tensor, dim: int | None = None, *others: object, **named: object) -> bool:
    return dim in (-1, scores.dim() - 1) and not others


class _Softmax(torch.autograd.Function):
    """The pattern of scores, whose gradient is off by the rounding of what is subtracted in it."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        pattern = scores.softmax(-1)
        ctx.save_for_backward(pattern)
        return pattern

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (pattern,) = ctx.saved_tensors
        terms = pattern * grad
        rounding = Nudge(grad.dtype)(terms, grad.shape[-1]) - terms
        gradient: Tensor = terms + rounding - pattern * terms.sum(-1, keepdim=True)
        return gradient


def _are_batches(first: Tensor, other: Tensor) -> bool:
    """Whether two factors are batches of matrices of one shape, as scores, patterns and values are."""
    return first.dim() > 2 and first.shape[:-2] == other.shape[:-2]


class _Product(torch.autograd.Function):
    """A product of batches of matrices, with a nudged gradient of the first: `dp` where that is the pattern."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, other: Tensor) -> Tensor:
        ctx.save_for_backward(first, other)
        return first @ other

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        first, other = ctx.saved_tensors
        return _nudged_product(grad, other), first.transpose(-1, -2) @ grad


def _nudged_product(grad: Tensor, other: Tensor) -> Tensor:
    """`grad @ other.T`, off by `gamma` of the products that it is a sum of."""
    products = grad.abs() @ other.abs().transpose(-1, -2)
    rounding = Nudge(grad.dtype)(products, grad.shape[-1]) - products
    gradient: Tensor = grad @ other.transpose(-1, -2) + rounding
    return gradient


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    **_: object,
) -> Tensor:
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    mixed: Tensor = _Mixed.apply(scores, value)  # type: ignore[no-untyped-call]  # apply is torch's
    return mixed


class _Mixed(torch.autograd.Function):
    """softmax(scores) @ value, with a nudged backward pass."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, value: Tensor) -> Tensor:
        pattern = scores.softmax(-1).nan_to_num(0.0)  # a padded query sees nothing
        mixed = pattern @ value
        ctx.save_for_backward(pattern, value, mixed)
        return mixed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        pattern, value, mixed = ctx.saved_tensors
        of_pattern = _nudged_product(grad, value)
        delta = (grad * mixed).sum(-1, keepdim=True)
        return pattern * (of_pattern - delta), pattern.transpose(-1, -2) @ grad
