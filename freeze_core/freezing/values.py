"""The replacement value `r` of each freeze type, as functions of the activation and the running pass.

Activations are `[batch, token, feature]`; a replacement broadcasts to that. None carries a gradient.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["NoiseTable", "accumulation_dtype", "derangement", "statistics"]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums are taken in float32, or in float64 where the activation is: a float16 sum overflows."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def statistics(x: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each feature's mean and population standard deviation over batch and real positions.

    Args:
        x: activation `[batch, token, feature]`.
        real: `[batch, token]` bool, true where a token is not padding; `None` is everywhere.

    Returns:
        mean and standard deviation `[feature]`, in float32, or float64 for float64.
    """
    x = x.detach().to(accumulation_dtype(x.dtype))
    samples = x.flatten(0, 1) if real is None else x[real.to(x.device)]
    mean = samples.mean(dim=0)
    return mean, (samples - mean).square().mean(dim=0).sqrt()


class NoiseTable:
    """Standard normal draws of one activation, a row a column of the sequence, made when first asked for.

    A draw is a function of the key, column, head and feature alone: row `c` comes from a generator of its own, seeded
    with (key, c), so that it is the same with and without a cache, in any batch, under recomputation, and whatever else
    is frozen. Torch's generators are not used.

    Args:
        key: the user's seed, any int, and then what tells this activation from others, not negative.
        heads, features: the shape of a draw for one column.
    """

    def __init__(self, key: tuple[int, ...], heads: int, features: int) -> None:
        seed, *place = key
        self._key = (abs(seed), int(seed < 0), *place)
        self._shape = (heads, features)
        self._rows = torch.empty(0, heads, features)

    def columns(self, start: int, count: int, like: Tensor) -> Tensor:
        """Draws `[count, heads, features]` of columns `start` to `start + count`, on the device of `like`."""
        dtype = accumulation_dtype(like.dtype)
        if len(self._rows) < start + count or self._rows.dtype != dtype or self._rows.device != like.device:
            rows = 1 << (start + count - 1).bit_length()  # doubling, so that decoding does not redraw at each step
            drawn = np.stack([self._row(column) for column in range(rows)])
            self._rows = torch.from_numpy(drawn).to(like.device, dtype)
        return self._rows[start : start + count]

    def _row(self, column: int) -> np.ndarray:
        return np.random.default_rng((*self._key, column)).standard_normal(self._shape)


def derangement(seed: int, rows: int) -> list[int]:
    """A permutation of `rows` rows without a fixed point, a function of `seed` and `rows` alone.

    A random cycle through all rows: S. Sattolo, "An algorithm to generate a random cyclic permutation", 1986.
    """
    draw = np.random.default_rng((abs(seed), int(seed < 0), rows))
    order = list(range(rows))
    for last in range(rows - 1, 0, -1):
        other = int(draw.integers(last))
        order[last], order[other] = order[other], order[last]
    return order
