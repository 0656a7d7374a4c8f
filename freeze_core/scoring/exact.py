"""The exact sweep: each head's circuit is frozen in a pass of its own; freezes with the same effect are run once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from tqdm.auto import tqdm

from freeze_core.errors import InterventionError
from freeze_core.generators import Generators
from freeze_core.scoring.batch_passes import BatchPasses
from freeze_core.scoring.distributed import Processes
from freeze_core.scoring.fingerprint import fingerprint_of
from freeze_core.scoring.progress import Progress
from freeze_core.scoring.sweep import Sweep

__all__ = ["exact"]


def exact(
    sweep: Sweep, path: Path | None = None, processes: Processes | None = None
) -> tuple[dict[str, Tensor], float]:
    """Each circuit's scores `[layer, head]`, and the metric of the clean passes, means over all rows.

    Args:
        path: of the checkpoint that the sweep goes on from.
        processes: which share the sweep; `None` is this one alone.
    """
    processes = processes or Processes(False)
    generators = Generators(sweep.model)
    fingerprint = fingerprint_of(sweep) if path is not None or processes.size > 1 else {}
    count = len(sweep.placed)
    progress = Progress(len(sweep.batches), count, fingerprint, processes, path)
    bar = tqdm(
        total=len(sweep.batches) * count,
        initial=progress.done,
        desc="score_heads",
        unit="freeze",
        disable=not sweep.show_progress or processes.rank > 0,
    )
    before = generators.states()
    try:
        with bar, progress.saved():
            for number, batch in enumerate(sweep.batches):
                passes = BatchPasses(sweep.model, sweep.sites, batch, generators)
                _BatchSweep(sweep, number, passes, progress, processes, bar).run()
    finally:
        generators.put(before)
    changes = [progress.change(index, sweep.rows) for index in range(count)]
    return sweep.table(changes), progress.clean_mean(sweep.rows)


class _Group(NamedTuple):
    """What is still to be run of the interventions of one layer that run together: their indices within the layer.

    Args:
        first: the index of the layer's first intervention among those of the sweep.
    """

    layer: int
    first: int
    indices: Sequence[int]


@dataclass(frozen=True, eq=False)
class _BatchSweep:
    """The sweep over one batch."""

    sweep: Sweep
    number: int
    passes: BatchPasses
    progress: Progress
    processes: Processes
    bar: Any

    def run(self) -> None:
        """Runs what is missing. The clean pass is run in any case: later batches draw from where it ends."""
        counts = {layer: len(of_layer) for layer, of_layer in self.sweep.wanted.items()}
        with self.passes.running(counts if self.progress.missing(self.number) else {}):
            clean = self._metric(self.passes.clean, "unfrozen")
            self.progress.begin(self.number, clean, self.passes)
            for turn, groups in enumerate(_rounds(self._missing_groups(), self.processes.size)):
                share = self.processes.share(groups, self.number + turn)
                for _, of_layer in groupby(share, key=lambda group: group.layer):
                    self._run_groups(list(of_layer), clean)
                self.bar.update(self.progress.merge(self.number))

    def _missing_groups(self) -> Iterator[list[_Group]]:
        """Of each layer the groups of which something is missing."""
        missing, first = self.progress.missing(self.number), 0
        for layer, of_layer in self.sweep.wanted.items():
            groups = self.passes.groups(len(of_layer))
            left = [[index for index in group if first + index in missing] for group in groups]
            yield [_Group(layer, first, indices) for indices in left if indices]
            first += len(of_layer)

    def _run_groups(self, groups: Sequence[_Group], clean: Tensor) -> None:
        """Scores interventions of one layer."""
        layer, first, _ = groups[0]
        wanted = self.sweep.wanted[layer]
        indices = [index for group in groups for index in group.indices]
        # An error that is held on to would hold the generator, too, and with it the patches of the projections.
        with closing(self.passes.frozen(layer, [one.freeze for one in wanted], indices)) as frozen:
            for index, logits in zip(indices, frozen, strict=True):
                where = f"under {' and '.join(f'{name} of {head}' for name, head in wanted[index].heads)} of {layer}"
                change = self._metric(logits, where) - clean
                if bool(change.isnan().any()):
                    raise InterventionError(
                        f"metric={self.sweep.metric.name} is infinite in batch {self.number}, both unfrozen and "
                        f"{where}: the change is no number; score something that is finite"
                    )
                self.progress.add(self.number, first + index, float(change.sum()))
                self.bar.update()

    def _metric(self, logits: Tensor, where: str) -> Tensor:
        """The metric of each row `[row]`."""
        return self.sweep.metric.rows(self.number, self.passes.batch, logits, self.passes.clean, where)


def _rounds(layers: Iterable[list[_Group]], processes: int) -> Iterator[list[_Group]]:
    """The groups between two exchanges: those of as many layers as have one for each process."""
    groups: list[_Group] = []
    for of_layer in layers:
        groups += of_layer
        if len(groups) >= processes:
            yield groups
            groups = []
    if groups:
        yield groups
