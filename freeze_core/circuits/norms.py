"""A norm as what it is: a linear map of what is divided by its own root mean square.

`N(x) = (x / rms(x)) A + b` for an RMS norm, where `A` is diagonal, and for a layer norm, whose `A` subtracts the mean
first and whose rms is of what is left. `A` and `b` can be folded into the weights that read the norm; the division
cannot.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from freeze_core.circuits.linear import Affine, pulled_back, rounding, wide
from freeze_core.errors import UnsupportedModelError

__all__ = ["folded"]

LARGE = 64.0
"""By which the drawn inputs are scaled, so that what a norm adds to the variance plays no part."""

DRAWS = 8


def folded(norm: nn.Module, like: Tensor, reader: Affine) -> Affine:
    """`reader` of what `norm` gives as a map of what it takes, divided by its rms (of a layer norm, its deviation).

    At 0 the division is one by the constant that keeps it from being one by 0, so that the derivative there is `A` but
    for that constant, which larger inputs tell.

    Raises:
        UnsupportedModelError: the module is no such norm.
    """
    name = type(norm).__name__
    slope = pulled_back(norm, like, reader.weight.T).T
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(DRAWS, like.shape[-1], generator=generator).to(like) * LARGE
    with torch.no_grad():
        given, at_zero = wide(norm(drawn[None])[0]), wide(norm(torch.zeros_like(drawn[None]))[0, 0])
    drawn = wide(drawn)
    # A layer norm's derivative takes a constant to 0, an RMS norm's does not.
    centred = bool((slope.sum(0).abs() <= rounding(like.dtype) * slope.abs().sum(0)).all())
    deviation = drawn - drawn.mean(-1, keepdim=True) if centred else drawn
    unit = drawn / deviation.square().mean(-1, keepdim=True).sqrt()
    expected, found = unit @ slope, (given - at_zero) @ reader.weight
    scale = (expected * found).sum() / expected.square().sum()
    error = (found - scale * expected).abs().max() / found.abs().max()
    if not bool(error <= 1e-3 + rounding(like.dtype)):  # nan, too
        raise UnsupportedModelError(f"a {name} divides by something else than a root mean square: it cannot be folded")
    return Affine(scale * slope, at_zero @ reader.weight + reader.bias)
