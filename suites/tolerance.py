"""What rounding may do, derived from dtype and sizes: the one place where tolerances come from.

A bound is never a constant that happened to pass. It is what the same computation changes by when its operands are
nudged by as much as rounding could have moved them: a sum of `n` products in a dtype with unit roundoff `u` is the
exact sum of products that were each changed by a relative `gamma(n)`, where

    gamma(n) = 6 * sqrt(n) * u

holds for one result with probability above 1 - 2 exp(-18) (Higham and Mary, "A New Approach to Probabilistic Rounding
Error Analysis", 2019). So operands are nudged by `gamma` with random signs, and the largest change is the bound. What
is claimed bit for bit has no tolerance.
"""

from __future__ import annotations

import copy
import math
from typing import cast
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pytest_circuitfreeze.origins import remembered
from pytest_circuitfreeze.wrapped import dtype_of

__all__ = ["Exact", "Nudge", "gamma", "nudged", "original"]

CONFIDENCE = 6.0
"""Standard deviations that a sum of rounding errors is allowed."""


def gamma(terms: int, dtype: torch.dtype) -> float:
    """Relative change of each product that explains the rounding of a sum of `terms` products in `dtype`."""
    return CONFIDENCE * math.sqrt(terms) * torch.finfo(dtype).eps / 2


class Nudge:
    """Multiplies tensors by `1 + gamma` or `1 - gamma`, at random; the same signs for the same seed.

    What is not 0 moves by the smallest normal number besides, below which a result may be lost altogether.

    Args:
        dtype: whose rounding is imitated; the tensors themselves may be of a wider one.
    """

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, exact: Tensor, terms: int = 1, dtype: torch.dtype | None = None) -> Tensor:
        """`exact` as a computation of `terms` terms in `dtype` might have seen it; same shape and dtype."""
        signs = 2 * torch.randint(0, 2, exact.shape, generator=self.generator, dtype=torch.int8).to(exact) - 1
        underflow = (exact != 0).to(exact) * torch.finfo(dtype or self.dtype).tiny
        return exact * (1 + gamma(terms, dtype or self.dtype) * signs) + underflow * signs


class Exact:
    """No rounding, where a `Nudge` may stand."""

    def __call__(self, exact: Tensor, terms: int = 1, dtype: torch.dtype | None = None) -> Tensor:
        return exact


_COPIES: WeakKeyDictionary[nn.Module, dict[torch.dtype, nn.Module]] = WeakKeyDictionary()
_ORIGINALS: WeakKeyDictionary[nn.Module, ReferenceType[nn.Module]] = WeakKeyDictionary()


@remembered
def nudged(model: PreTrainedModel, rounding: torch.dtype | None = None) -> PreTrainedModel:
    """A copy of `model` that is off by as much as rounding in a dtype, by default its own, could put it off.

    Its weights are nudged by `gamma` of their fan-in (what a layer multiplies by them, where they are quantised), and
    so are the gradients that arrive at its linear layers, since a gradient may be a sum that cancels whatever the
    weights are (that of a key's bias does). Made once a model and kept as long as it.
    """
    dtype = rounding or dtype_of(model)
    copies = _COPIES.setdefault(model, {})
    if dtype not in copies:
        twin = copy.deepcopy(model, _kept_results(model) | _shared(model))
        nudge = Nudge(dtype)
        with torch.no_grad():
            for parameter in filter(_holds_numbers, twin.parameters()):
                terms = min(parameter.shape) if parameter.ndim > 1 else 1
                parameter.copy_(nudge(parameter.double(), terms))
        for module in twin.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding):
                module.register_forward_hook(_nudge_gradient)
                if not _holds_numbers(weight):
                    module.register_forward_pre_hook(_nudge_input)
        copies[dtype] = twin
        _ORIGINALS[twin] = ref(model)
    return cast(PreTrainedModel, copies[dtype])


def _kept_results(model: nn.Module) -> dict[int, object]:
    """Copies of what a model keeps of its last pass, by identity: a result in a graph cannot be copied otherwise."""
    kept = (value for module in model.modules() for value in (*vars(module).values(), *module._buffers.values()))
    return {id(value): value.detach().clone() for value in kept if isinstance(value, Tensor) and not value.is_leaf}


def _shared(model: nn.Module) -> dict[int, object]:
    """Quantised weights, by identity: some cannot be copied, and none is changed in the copy."""
    return {id(parameter): parameter for parameter in model.parameters() if not _holds_numbers(parameter)}


def original(model: nn.Module) -> PreTrainedModel | None:
    """The model that `nudged` made this one of; `None` where it is no such copy."""
    found = _ORIGINALS.get(model)
    return None if found is None else cast("PreTrainedModel | None", found())


def _holds_numbers(weight: Tensor) -> bool:
    """Whether a weight holds the numbers that a layer multiplies by, as quantised ones do not."""
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()


def _nudge_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Nudges what a linear layer multiplies, alike on every pass."""
    return (Nudge(args[0].dtype)(args[0], args[0].shape[-1]), *args[1:])


def _nudge_gradient(module: nn.Module, args: object, output: object) -> None:
    """Nudges the gradient that arrives at a linear layer's output, alike on every pass."""
    if isinstance(output, Tensor) and output.requires_grad:
        terms = output.shape[-1]
        output.register_hook(lambda grad: Nudge(grad.dtype)(grad, terms))
