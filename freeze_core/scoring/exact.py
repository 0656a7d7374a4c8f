"""The exact sweep: each head's circuit frozen in a forward of its own, equal ones once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from freeze_core.errors import InterventionError
from freeze_core.scoring.checkpoint import Checkpoint
from freeze_core.scoring.generators import Generators
from freeze_core.scoring.ledger import Ledger
from freeze_core.scoring.metrics import Metric
from freeze_core.scoring.passes import Passes
from freeze_core.scoring.processes import Processes
from freeze_core.scoring.question import question_of
from freeze_core.scoring.sweep import Intervention, Sweep

__all__ = ["exact"]


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
    left = {layer: ledger.left(number, indices) for layer, indices in numbered.items()}
    counts = {layer: len(several) for layer, several in wanted.items()}
    with passes.running(counts if any(left.values()) else {}):
        clean = metric.rows(number, passes.batch, passes.clean, passes.clean, "unfrozen")
        ledger.start(number, clean, passes)
        for turn, (layer, several) in enumerate(wanted.items()):
            if not left[layer]:
                continue
            first, mine = numbered[layer].start, ledger.share(left[layer], number + turn)
            frozen = passes.frozen(layer, [one.freeze for one in several], [index - first for index in mine])
            for index, logits in zip(mine, frozen, strict=True):
                heads = " and ".join(f"{name} of {head}" for name, head in several[index - first].heads)
                where = f"under {heads} of {layer}"
                change = metric.rows(number, passes.batch, logits, passes.clean, where) - clean
                if bool(change.isnan().any()):
                    raise InterventionError(
                        f"metric={metric.name} is infinite in batch {number}, both unfrozen and {where}: the change is "
                        "no number; score something that is finite"
                    )
                ledger.add(number, index, float(change.sum()))
                bar.update()
            bar.update(ledger.settle(number))


def _stretches(lengths: Iterable[int]) -> Iterator[range]:
    """Stretches of these lengths, one after the other."""
    start = 0
    for length in lengths:
        yield range(start, start + length)
        start += length
