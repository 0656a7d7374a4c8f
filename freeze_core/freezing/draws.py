"""Draws that depend on a seed and a place alone: standard normals by column, and orders of rows.

Torch's generators are not used, so that a draw is the same with and without a cache, in any batch, under recomputation,
whatever else is frozen, and in a compiled pass.
"""

from __future__ import annotations

from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from freeze_core.ordinary import ordinary_tensors, unwrapped

__all__ = ["NoiseTable", "accumulation_dtype", "derangement"]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and draws: float32, or float64 for a float64 activation, since a float16 sum overflows."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class NoiseTable:
    """Standard normal draws of one activation, a row for each column of the sequence, computed when first needed.

    A draw is a function of the key, column, head and feature alone: row `c` comes from its own generator, which is
    seeded with (key, c).

    Args:
        key: the user's seed, any int, and then what tells this activation from others, not negative.
        heads, features: the shape of a draw for one column.
    """

    def __init__(self, key: tuple[int, ...], heads: int, features: int) -> None:
        seed, *place = key
        self._key = (abs(seed), int(seed < 0), *place)
        self._shape = (heads, features)
        self._rows = torch.empty(0, heads, features)
        name = " ".join(map(hex, key))
        # As a tensor: a compiled pass takes another one as it takes another mask, where another text is another graph.
        self._name = torch.tensor(list(name.encode()), dtype=torch.uint8, device="cpu")
        _TABLES[name, heads, features] = self

    def columns(self, start: int, count: int, like: Tensor) -> Tensor:
        """Draws `[count, heads, features]` of columns `start` to `start + count`, on the device of `like`."""
        dtype = accumulation_dtype(like.dtype)
        if torch.compiler.is_compiling():
            drawn: Tensor = _traced_columns(self._name, *self._shape, start, count)
            return drawn.to(like.device, dtype)
        if len(self._rows) < start + count or self._rows.dtype != dtype or self._rows.device != like.device:
            rows = 1 << (start + count - 1).bit_length()  # doubling, so that decoding does not redraw at each step
            table = np.stack([self._row(column) for column in range(rows)])
            # Kept for later passes: made under a transform of torch.func, it would be a tensor of that call's alone.
            with ordinary_tensors():
                self._rows = unwrapped(torch.from_numpy(table).to(like.device, dtype))
        return self._rows[start : start + count]

    def _row(self, column: int) -> np.ndarray:
        return np.random.default_rng((*self._key, column)).standard_normal(self._shape)


_TABLES: WeakValueDictionary[tuple[str, int, int], NoiseTable] = WeakValueDictionary()
"""The tables that are in use, for compiled passes; those of one key and shape hold the same draws."""


@torch.library.custom_op("circuitfreeze::normals", mutates_args=())
def _traced_columns(name: Tensor, heads: int, features: int, start: int, count: int) -> Tensor:
    """Columns of a table, in float64 on the CPU, as a step that a compiled pass takes without looking inside."""
    key = bytes(name.tolist()).decode()
    numbers = tuple(int(part, 16) for part in key.split())
    table = _TABLES.get((key, heads, features)) or NoiseTable(numbers, heads, features)
    return table.columns(start, count, torch.empty(0, dtype=torch.float64)).clone()


@_traced_columns.register_fake
def _(name: Tensor, heads: int, features: int, start: int, count: int) -> Tensor:
    return torch.empty(count, heads, features, dtype=torch.float64)


def derangement(seed: int, rows: int) -> Tensor:
    """A permutation of `rows` rows without a fixed point, `[rows]`, a function of `seed` and `rows` alone.

    A random cycle through all rows: S. Sattolo, "An algorithm to generate a random cyclic permutation", 1986.
    """
    order: Tensor = _traced_order(hex(seed), rows) if torch.compiler.is_compiling() else _order(seed, rows)
    return order


@torch.library.custom_op("circuitfreeze::derangement", mutates_args=())
def _traced_order(seed: str, rows: int) -> Tensor:
    return _order(int(seed, 16), rows)


@_traced_order.register_fake
def _(seed: str, rows: int) -> Tensor:
    return torch.empty(rows, dtype=torch.long)


def _order(seed: int, rows: int) -> Tensor:
    draw = np.random.default_rng((abs(seed), int(seed < 0), rows))
    order = list(range(rows))
    for last in range(rows - 1, 0, -1):
        other = int(draw.integers(last))
        order[last], order[other] = order[other], order[last]
    return torch.tensor(order)
