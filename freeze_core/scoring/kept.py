"""What a sweep has done so far: the change of the metric by batch and intervention."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Change", "Kept"]

Change = tuple[int, int, float]
"""A batch, an intervention, and the sum over the batch's rows of what the one changes."""


@dataclass(frozen=True, eq=False)
class Kept:
    """Sums over the rows of each batch, float64 on the CPU, nan for what is still to be done.

    They are added up at the end only, in the order of the batches: the table is the same bits, whoever did what when.

    Args:
        changes: `[batch, intervention]`, the metric frozen minus clean.
        clean: `[batch]`, the metric of the clean pass.
        sizes: `[batch]`, the norm of the clean logits, by which another pass over the same batch is told.
        drawn: `[batch]`, what the clean pass drew, see `Generators.drawn`.
    """

    changes: Tensor
    clean: Tensor
    sizes: Tensor
    drawn: Tensor

    @classmethod
    def nothing(cls, batches: int, interventions: int) -> Kept:
        """Nothing done yet."""
        shapes = ((batches, interventions), *[(batches,)] * 3)
        return cls(*(torch.full(shape, torch.nan, dtype=torch.float64) for shape in shapes))

    @classmethod
    def told(cls, lists: dict[str, Any]) -> Kept:
        """What `lists` told of."""
        return cls(**{name: torch.tensor(values, dtype=torch.float64) for name, values in lists.items()})

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their names."""
        return dict(vars(self))

    def lists(self) -> dict[str, Any]:
        """The same as lists of numbers, none of which loses a bit."""
        return {name: values.tolist() for name, values in self.tensors().items()}

    @property
    def done(self) -> int:
        """How many changes are known."""
        return int((~self.changes.isnan()).sum())

    def left(self, batch: int, interventions: Iterable[int]) -> list[int]:
        """Those of `interventions` that are still to be done in a batch."""
        return [one for one in interventions if math.isnan(self.changes[batch, one])]

    def add(self, changes: Iterable[Change]) -> None:
        """Keeps what was done."""
        for batch, intervention, change in changes:
            self.changes[batch, intervention] = change

    def change(self, intervention: int, rows: int) -> float:
        """What an intervention changes, the mean over all `rows`."""
        return float(sum(self.changes[:, intervention].tolist())) / rows

    def clean_mean(self, rows: int) -> float:
        """The metric of the clean passes, the mean over all `rows`."""
        return float(sum(self.clean.tolist())) / rows
