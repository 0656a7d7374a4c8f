"""The end of a pass: the last layer's MLP, and the unembedding, at the positions that the metric reads.

To unembed a few states costs nearly what reading the matrix costs. So a pass only hands over its last states
(`CollectStates`), and one further pass, whose layers are replayed, unembeds those of several passes (`UnembedStates`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from freeze_core.errors import InterventionError
from freeze_core.scoring.batches import Batch

__all__ = ["CollectStates", "ObserveUnembedding", "RunAtPositions", "UnembedAtPositions", "UnembedStates", "find_parts"]

WORTHWHILE = 256
"""Positions that are unembedded at once: for fewer the product is slower, for one 9 times a position."""

LARGEST = 2**24
"""Logits that are made at once, of one pass at least."""


class ObserveUnembedding:
    """Runs the unembedding, and keeps the shapes of what it reads and gives.

    Args:
        runs: how often it ran.
        width: how many features a logit is the sum of.
        logits: an empty tensor `[0, column, word]` of the dtype and on the device of the logits.
    """

    def __init__(self) -> None:
        self.runs = 0
        self.width = 0
        self.logits = torch.empty(0)

    def __call__(self, forward: Callable[..., Any], states: Tensor, *args: Any, **kwargs: Any) -> Any:
        logits = forward(states, *args, **kwargs)
        self.runs += 1
        self.width = states.shape[-1]
        self.logits = logits.new_empty(0, *logits.shape[1:])
        return logits

    def passes_at_once(self, batch: Batch) -> int:
        """How many passes have their states unembedded together."""
        words = max(1, self.logits.shape[-1])
        return max(1, min(WORTHWHILE, LARGEST // words) // batch.positions.numel())


class CollectStates:
    """Keeps the states at the positions `[row, position, feature]` in place of unembedding them."""

    def __init__(self, observed: ObserveUnembedding, batch: Batch) -> None:
        self._observed = observed
        self._batch = batch
        self.states = torch.empty(0)

    def __call__(self, forward: Callable[..., Any], states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.states = _at_positions(self._batch, states)
        return self._observed.logits.new_zeros(self._batch.rows, 1, *self._observed.logits.shape[2:])


class UnembedAtPositions:
    """Unembeds the states at the positions alone."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def __call__(self, forward: Callable[..., Any], states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(_at_positions(self._batch, states), *args, **kwargs)


class UnembedStates:
    """Unembeds states that were collected, in place of those of the pass.

    Args:
        states: of each pass, `None` for one that was not run. Zeros take its place, so that the product is of the same
            shape, and the logits of each pass are the same bits, whichever others are run.
    """

    def __init__(self, states: Sequence[Tensor | None]) -> None:
        present = next(one for one in states if one is not None)
        self._states = torch.cat([torch.zeros_like(present) if one is None else one for one in states])

    def __call__(self, forward: Callable[..., Any], states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(self._states, *args, **kwargs)


class RunAtPositions:
    """Runs a module that treats each position by itself at the wanted ones alone, and gives `fill` at the others."""

    def __init__(self, batch: Batch, fill: float) -> None:
        self._batch = batch
        self._fill = fill

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        if not isinstance(x, Tensor) or x.shape[:2] != (self._batch.rows, self._batch.columns):
            return forward(*args, **kwargs)
        wanted = forward(self._batch.at_positions(x))
        if not isinstance(wanted, Tensor) or wanted.shape[:2] != self._batch.positions.shape:
            raise InterventionError("a part of the last layer does not give a tensor [batch, token, …]")
        output = wanted.new_full((*x.shape[:2], *wanted.shape[2:]), self._fill)
        output[self._batch.index(x.device)] = wanted
        return output


def find_parts(layer: nn.Module, others: Sequence[nn.Module]) -> list[nn.Module]:
    """The parts of a layer that may treat each position by itself: those with matrices that hold none of `others`."""
    return [
        part
        for part in layer.children()
        if any(parameter.dim() > 1 for parameter in part.parameters()) and not set(others) & set(part.modules())
    ]


def _at_positions(batch: Batch, states: Tensor) -> Tensor:
    if states.shape[:2] != (batch.rows, batch.columns):
        raise InterventionError(f"the unembedding is given {list(states.shape)}, not [batch, token, feature]")
    return batch.at_positions(states)
