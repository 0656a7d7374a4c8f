"""Freezes of one layer as rows of one pass: each runs its layer by itself, then all go through the later ones together.

A layer that is given few tokens costs what reading its weights costs, for one freeze as for several. Only the frozen
layer is run under the freeze, on the batch's own rows; the later ones run on as many copies of the batch as there are
freezes, each copy from what the frozen layer gave under one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from freeze_core.scoring.batches import Batch
from freeze_core.scoring.prefix import CachedLayers
from freeze_core.scoring.tail import Tail

__all__ = ["Stacked", "Under", "stacks", "written"]

Under = Callable[[], AbstractContextManager[object]]
"""What makes a context in which a pass is run."""

TOKENS = 256
"""Of all rows of a pass together, at most: from about so many on a further token costs as much as the one before."""

LEAST = 3
"""Freezes that are run together, or each is by itself: two save little, and finding out takes three."""


def stacks(freezes: int, most: int) -> list[range]:
    """The places of so many freezes that run together, `most` of them: as few stretches, and as even, as can be."""
    count = -(-freezes // most) if most >= LEAST else freezes
    return [range(freezes * one // count, freezes * (one + 1) // count) for one in range(count)]


def written(model: nn.Module) -> list[int]:
    """How often each of the model's buffers was written to (statistics of batches, say)."""
    return [0 if buffer.is_inference() else buffer._version for buffer in model.buffers()]


class Stacked:
    """The passes over one batch in which several freezes of one layer go through the later layers together.

    Args:
        layers: which give what is stacked.
        tail: which keeps the last states.
        batch: the rows of one freeze.
        run: runs the model over the batch that it is given.
    """

    def __init__(self, layers: CachedLayers, tail: Tail, batch: Batch, run: Callable[[Batch], object]) -> None:
        self._layers = layers
        self._tail = tail
        self._batch = batch
        self._run = run

    @property
    def most(self) -> int:
        """How many freezes run together. It depends on shapes alone: so do the bits of what a freeze gives."""
        return min(TOKENS // (self._batch.rows * self._batch.columns), self._tail.at_once)

    def pays(self, freezes: Mapping[int, int]) -> bool:
        """Whether so many freezes of each layer save twice the layers that finding out by `keep_beside_others` runs."""
        later = {layer: len(self._layers) - 1 - layer for layer in freezes}
        saved = sum((count - len(stacks(count, self.most))) * later[layer] for layer, count in freezes.items())
        return saved > 2 * LEAST * max(later.values())

    def keep(self, layer: int, several: Sequence[Under | None]) -> None:
        """Has the tail keep the last states under each of several freezes of `layer`.

        `None` is one that is not run: the clean pass is in its place, so that those of the others are the same bits.
        """
        self._go_on(layer, [self._output(layer, under) for under in several])

    def keep_beside_others(self, layer: int) -> None:
        """Has the tail keep the last states of the clean pass, from behind `layer` on, between those of two others.

        In the one above all is nan, and so would be whatever depended on it. In the one below are numbers, which may be
        compared with where nan never is the larger: those of the clean pass, negated, and of each state in reverse.
        """
        clean = self._layers.clean(layer)
        self._go_on(layer, [_each(clean, _nan), clean, _each(clean, _reversed)])

    def _output(self, layer: int, under: Under | None) -> Any:
        """What `layer` gives in a pass that ends there."""
        if under is None:
            return self._layers.clean(layer)
        with under(), self._layers.only(layer) as kept, self._tail.doing("skip"):
            self._run(self._batch)
        return kept()

    def _go_on(self, layer: int, outputs: Sequence[Any]) -> None:
        copies = self._batch.copies(len(outputs))
        with self._layers.behind(layer, outputs), self._tail.over(copies), self._tail.doing("keep"):
            self._run(copies)


def _each(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What a layer gives, each of its floating-point parts changed."""
    if type(output) is tuple:
        return tuple(_each(part, change) for part in output)
    return change(output) if isinstance(output, Tensor) and output.is_floating_point() else output


def _nan(part: Tensor) -> Tensor:
    return torch.full_like(part, torch.nan)


def _reversed(part: Tensor) -> Tensor:
    return -part.flip(-1)
