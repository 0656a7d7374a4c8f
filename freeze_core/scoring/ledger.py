"""Who has done what of a sweep: kept in a checkpoint, and told to the processes that share it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from freeze_core.errors import InterventionError
from freeze_core.scoring.checkpoint import Checkpoint
from freeze_core.scoring.kept import Change, Kept
from freeze_core.scoring.passes import Passes
from freeze_core.scoring.processes import Processes
from freeze_core.scoring.question import Question, differing

__all__ = ["Ledger"]

_T = TypeVar("_T")

ROUNDING = 16
"""How many times the rounding of a number two clean passes may differ by: other products on another machine."""

OTHER_DRAWS = (
    "the passes over batch {batch} draw (dropout) from other states of torch's generators: call torch.manual_seed with "
    "the same seed"
)


class Ledger:
    """What has been done of one sweep. The first process alone reads and writes the checkpoint.

    Args:
        question: what is asked; empty where nobody else could have asked another one.

    Raises:
        InterventionError: the checkpoint is of another sweep, or another process is asked something else.
    """

    def __init__(
        self,
        processes: Processes,
        checkpoint: Checkpoint | None,
        question: Question,
        batches: int,
        interventions: int,
    ) -> None:
        self._processes = processes
        self._checkpoint = checkpoint if processes.rank == 0 else None
        self._question = question
        self._unsaid: list[Change] = []
        first = Kept.nothing(batches, interventions)
        if self._checkpoint:
            first = self._checkpoint.load(question, batches, interventions)
        heard = processes.exchange({"question": question, "kept": first.lists() if processes.rank == 0 else None})
        processes.raise_failures(heard)
        _refuse_others([said["question"] for said in heard])
        self.kept = Kept.told(heard[0]["kept"])

    def left(self, batch: int, interventions: Iterable[int]) -> list[int]:
        """Those of `interventions` that nobody has done in a batch."""
        return self.kept.left(batch, interventions)

    def rounds(self, layers: Iterable[Sequence[_T]]) -> Iterator[list[_T]]:
        """What is left, given layer by layer: of as many layers at a time as have something for each process."""
        several: list[_T] = []
        for of_layer in layers:
            several += of_layer
            if len(several) >= self._processes.size:
                yield several
                several = []
        if several:
            yield several

    def share(self, left: Sequence[_T], turn: int) -> Sequence[_T]:
        """Those that this process is to do."""
        return self._processes.share(left, turn)

    def start(self, batch: int, clean: Tensor, passes: Passes) -> None:
        """Keeps the metric `[row]` of the clean pass, and by what another clean pass is told from it.

        Raises:
            InterventionError: what is kept of this batch is from another clean pass.
        """
        if not self._question:
            self.kept.clean[batch] = float(clean.sum())
            return
        size, before = _size(passes.clean), float(self.kept.sizes[batch])
        self._bound = ROUNDING * torch.finfo(passes.clean.dtype).eps
        if math.isnan(before):
            self.kept.sizes[batch], self.kept.drawn[batch] = size, passes.drawn
            self.kept.clean[batch] = float(clean.sum())
        elif passes.drawn != self.kept.drawn[batch]:
            raise InterventionError(f"checkpoint: {OTHER_DRAWS.format(batch=batch)} as when it was begun")
        elif not self._same(size, before):
            raise InterventionError(
                f"checkpoint: the clean logits of batch {batch} have norm {size:.9g}, and had {before:.9g} when it was "
                "begun: something about the model (hooks, adapters) is another; put it back, or give another path"
            )
        elif not self._same(float(clean.sum()), float(self.kept.clean[batch])):
            raise InterventionError(
                f"checkpoint: the metric of the clean pass over batch {batch} is {float(clean.sum()):.9g} in sum, and "
                f"was {float(self.kept.clean[batch]):.9g} when it was begun: it is another metric of the same name; "
                "give that one, or another path"
            )

    def add(self, batch: int, intervention: int, change: float) -> None:
        """Keeps what this process has done."""
        self._unsaid.append((batch, intervention, change))
        self.kept.add(self._unsaid[-1:])
        if self._checkpoint:
            self._checkpoint.save_if_due(self.kept, self._question)

    def settle(self, batch: int) -> int:
        """Tells the others what was done since, and keeps what they did: how many that were.

        Raises:
            InterventionError: another one failed, or its clean pass gave something else.
        """
        own = len(self._unsaid)
        clean = {name: float(values[batch]) for name, values in self.kept.tensors().items() if name != "changes"}
        heard = self._processes.exchange({"changes": self._unsaid, **clean})
        found = self._hear(heard)
        self._processes.raise_failures(heard)
        if self._processes.several:
            self._compare(batch, heard)
            self.kept.clean[batch] = heard[0]["clean"]
        return found - own

    def _compare(self, batch: int, heard: Sequence[Any]) -> None:
        if any(said["drawn"] != heard[0]["drawn"] for said in heard):
            raise InterventionError(f"distributed: {OTHER_DRAWS.format(batch=batch)} in every process")
        sizes = [said["sizes"] for said in heard]
        if not all(self._same(one, sizes[0]) for one in sizes):
            raise InterventionError(
                f"distributed: the clean logits of batch {batch} have another norm in each process, {sizes}: give all "
                "of them the same model (hooks and adapters, too)"
            )
        metrics = [said["clean"] for said in heard]
        if not all(self._same(one, metrics[0]) for one in metrics):
            raise InterventionError(
                f"distributed: the metric of the clean pass over batch {batch} is another in each process, {metrics}: "
                "give all of them the same metric"
            )

    @contextmanager
    def open(self) -> Iterator[None]:
        """Whatever is raised within, what is done is kept, and the others are told."""
        try:
            yield
            self._save()
        except BaseException as error:
            self._hear(self._processes.fail(error, changes=self._unsaid))
            self._save()
            raise

    def _hear(self, heard: Sequence[Any]) -> int:
        self._unsaid = []
        changes = [change for said in heard for change in said.get("changes", ())]
        self.kept.add(changes)
        return len(changes)

    def _same(self, size: float, other: float) -> bool:
        return size == other or math.isclose(size, other, rel_tol=self._bound)

    def _save(self) -> None:
        if self._checkpoint:
            self._checkpoint.save(self.kept, self._question)


def _size(logits: Tensor) -> float:
    """The norm of what is finite or infinite in `logits` `[row, position, word]`, a row in float64 at a time."""
    rows = (row.double() for row in logits)
    return math.hypot(*(float(torch.where(row.isnan(), 0, row).norm()) for row in rows))


def _refuse_others(questions: Sequence[Question]) -> None:
    for rank, question in enumerate(questions):
        if question != questions[0]:
            raise InterventionError(
                "distributed: the processes are asked different things: what differs between process 0 and process "
                f"{rank}: {differing(questions[0], question)}; give all of them the same model, inputs and arguments"
            )
