"""The matrix of a module that is linear, whatever holds its weights: read off its derivative, and held against it.

A Linear, a transposed Conv1D, a quantised layer and one with adapters are all the same here. At 0 and with one-hot
cotangents the derivative is the weight itself, without rounding, and without the bias that a basis vector would bring.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from freeze_core.errors import UnsupportedModelError

__all__ = ["Affine", "affine", "pulled_back", "rounding", "wide"]


class Affine(NamedTuple):
    """`x @ weight + bias`: weight `[in, out]`, bias `[out]`, in float32 or wider."""

    weight: Tensor
    bias: Tensor


def wide(values: Tensor) -> Tensor:
    """In float32, or float64 if they are."""
    return values if values.dtype == torch.float64 else values.float()


def rounding(dtype: torch.dtype) -> float:
    """What some operations in `dtype` may err by, in parts of the magnitudes that they add up."""
    return 16 * torch.finfo(dtype).eps


def pulled_back(module: nn.Module, like: Tensor, cotangents: Tensor) -> Tensor:
    """`cotangents @ J` `[row, in]` for the derivative `J` `[out, in]` of a module at 0.

    Args:
        like: something that the module takes: its features, dtype and device are those of `like`.
        cotangents: `[row, out]`.

    Raises:
        UnsupportedModelError: the module has no derivative, or gives more than one tensor.
    """
    with torch.inference_mode(False), torch.enable_grad():
        zero = like.new_zeros(1, len(cotangents), like.shape[-1]).requires_grad_()
        try:
            given = module(zero)
            if not isinstance(given, Tensor):
                raise UnsupportedModelError(f"a {type(module).__name__} gives a {type(given).__name__}: it is no map")
            (found,) = torch.autograd.grad(given, zero, cotangents.to(given)[None])
        except RuntimeError as error:
            raise UnsupportedModelError(f"a {type(module).__name__} has no derivative here: {error}") from error
    return wide(found[0])


def affine(module: nn.Module, taken: Tensor, outputs: Tensor | None, inputs: Tensor | None = None) -> Affine:
    """The map from the features `inputs` of what `module` takes to the features `outputs` of what it gives.

    Args:
        taken: what it took `[token, in]`, for the judgement whether it is linear.
        outputs, inputs: indices; `None` is all of them.

    Raises:
        UnsupportedModelError: it is not linear.
    """
    alone = taken.clone()
    if inputs is not None:
        alone = torch.zeros_like(taken)
        alone[:, inputs] = taken[:, inputs]
    with torch.no_grad():
        given, bias = module(alone[None])[0], module(torch.zeros_like(alone[None, :1]))[0, 0]
    chosen = torch.arange(len(bias)) if outputs is None else outputs
    rows = nn.functional.one_hot(chosen, len(bias)).to(bias)
    weight = pulled_back(module, taken, rows).T
    given, bias = wide(given[:, chosen]), wide(bias[chosen])
    found = wide(alone) @ weight + bias
    bound = rounding(taken.dtype) * (wide(alone).abs() @ weight.abs() + bias.abs())
    if not bool(((given - found).abs() <= bound).all()):
        raise UnsupportedModelError(
            f"a {type(module).__name__} is not linear: it gives what is {float((given - found).abs().max()):.3g} from "
            "what its derivative at 0 says, so that it has no matrix"
        )
    return Affine(weight if inputs is None else weight[inputs], bias)
