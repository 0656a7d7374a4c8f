"""The exact sweep: each head's circuit frozen in a forward of its own, equal ones once."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import groupby
from operator import itemgetter
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from freeze_core.errors import InterventionError
from freeze_core.generators import Generators
from freeze_core.scoring.checkpoint import Checkpoint
from freeze_core.scoring.ledger import Ledger
from freeze_core.scoring.metrics import Metric
from freeze_core.scoring.passes import Passes
from freeze_core.scoring.processes import Processes
from freeze_core.scoring.question import question_of
from freeze_core.scoring.sweep import Intervention, Sweep

__all__ = ["exact"]

Stack = tuple[int, list[int]]
"""A layer, and those of its interventions that are run together."""


def exact(
    sweep: Sweep, checkpoint: Checkpoint | None = None, processes: Processes | None = None
) -> tuple[dict[str, Tensor], float]:
    """Each circuit's scores `[layer, head]`, and the metric of the clean passes, means over all rows."""
    processes = processes or Processes(False)
    generators = Generators(sweep.model)
    compared = checkpoint is not None or processes.several
    question = question_of(sweep.model, sweep.batches, sweep.metric, sweep.wanted) if compared else {}
    count = len(sweep.placed)
    ledger = Ledger(processes, checkpoint, question, len(sweep.batches), count)
    bar = tqdm(
        total=len(sweep.batches) * count,
        initial=ledger.kept.done,
        desc="score_heads",
        unit="freeze",
        disable=not sweep.progress or processes.rank > 0,
    )
    before = generators.states()
    try:
        with bar, ledger.open():
            for number, batch in enumerate(sweep.batches):
                passes = Passes(sweep.model, sweep.sites, batch, generators)
                _over_batch(number, passes, sweep.metric, sweep.wanted, ledger, bar)
    finally:
        generators.put(before)
    changes = [ledger.kept.change(index, sweep.rows) for index in range(count)]
    return sweep.table(changes), ledger.kept.clean_mean(sweep.rows)


def _over_batch(
    number: int,
    passes: Passes,
    metric: Metric,
    wanted: Mapping[int, Sequence[Intervention]],
    ledger: Ledger,
    bar: Any,
) -> None:
    """What is left of one batch. The clean pass is run in any case: later ones draw from where it ends."""
    numbered = dict(zip(wanted, _stretches(map(len, wanted.values())), strict=True))
    left = {index for indices in numbered.values() for index in ledger.left(number, indices)}
    counts = {layer: len(several) for layer, several in wanted.items()}
    with passes.running(counts if left else {}):
        clean = metric.rows(number, passes.batch, passes.clean, passes.clean, "unfrozen")
        ledger.start(number, clean, passes)
        for turn, several in enumerate(ledger.rounds(_stacks(passes, numbered, left))):
            mine = ledger.share(several, number + turn)
            with closing(_frozen(passes, wanted, numbered, mine)) as frozen:  # not when its last reference is gone
                for layer, index, logits in frozen:
                    one = wanted[layer][index - numbered[layer].start]
                    where = f"under {' and '.join(f'{name} of {head}' for name, head in one.heads)} of {layer}"
                    change = metric.rows(number, passes.batch, logits, passes.clean, where) - clean
                    if bool(change.isnan().any()):
                        raise InterventionError(
                            f"metric={metric.name} is infinite in batch {number}, both unfrozen and {where}: the "
                            "change is no number; score something that is finite"
                        )
                    ledger.add(number, index, float(change.sum()))
                    bar.update()
            bar.update(ledger.settle(number))


def _stacks(passes: Passes, numbered: Mapping[int, range], left: Collection[int]) -> Iterator[list[Stack]]:
    """Of each layer what is left of it, stack by stack."""
    for layer, indices in numbered.items():
        places = passes.stacks(len(indices))
        stacks = [[index for index in indices[one.start : one.stop] if index in left] for one in places]
        yield [(layer, stack) for stack in stacks if stack]


def _frozen(
    passes: Passes,
    wanted: Mapping[int, Sequence[Intervention]],
    numbered: Mapping[int, range],
    stacks: Sequence[Stack],
) -> Generator[tuple[int, int, Tensor]]:
    """The logits under each intervention of some stacks, with its layer and its index."""
    for layer, of_layer in groupby(stacks, key=itemgetter(0)):
        indices = [index for _, stack in of_layer for index in stack]
        freezes = [one.freeze for one in wanted[layer]]
        places = [index - numbered[layer].start for index in indices]
        with closing(passes.frozen(layer, freezes, places)) as frozen:
            for index, logits in zip(indices, frozen, strict=True):
                yield layer, index, logits


def _stretches(lengths: Iterable[int]) -> Iterator[range]:
    """Stretches of these lengths, one after the other."""
    start = 0
    for length in lengths:
        yield range(start, start + length)
        start += length
