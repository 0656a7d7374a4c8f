"""The exact sweep: each head's circuit frozen in a forward of its own, equal ones once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from freeze_core.attention.sites import Sites
from freeze_core.config import InterventionConfig
from freeze_core.errors import InterventionError
from freeze_core.freezing.plan import LayerFreeze, assign, refuse_dependent, resolve
from freeze_core.scoring.batches import Batch
from freeze_core.scoring.checkpoint import Checkpoint
from freeze_core.scoring.generators import Generators
from freeze_core.scoring.kept import Kept
from freeze_core.scoring.ledger import Ledger
from freeze_core.scoring.metrics import Metric
from freeze_core.scoring.passes import Passes
from freeze_core.scoring.processes import Processes
from freeze_core.scoring.question import question_of
from freeze_core.vocabulary import ROLES

__all__ = ["Intervention", "exact", "interventions"]


@dataclass
class Intervention:
    """One freeze, and the heads that it is the freeze of: `(circuit, head)`."""

    freeze: LayerFreeze
    heads: list[tuple[str, int]] = field(default_factory=list)


def interventions(sites: Sites, configs: Mapping[str, InterventionConfig]) -> dict[int, list[Intervention]]:
    """What is to be frozen in each layer: each head by each circuit's config, what comes to the same once.

    Raises:
        CircuitFreezeError: one of them cannot be served.
    """
    by_layer: dict[int, dict[object, Intervention]] = {}
    for circuit, config in configs.items():
        for whole in resolve(config, sites, roles=("z",) if circuit == "z" else None):
            site = sites.by_layer[whole.layer]
            for head in whole.heads:
                freeze = replace(whole, heads=(head,))
                refuse_dependent(site, [freeze])
                assignment = assign(site, [freeze])
                key = tuple(assignment[role] for role in ROLES)
                same = by_layer.setdefault(whole.layer, {}).setdefault(key, Intervention(freeze))
                same.heads.append((circuit, head))
    return {layer: list(by_layer[layer].values()) for layer in sorted(by_layer)}


def exact(
    model: nn.Module,
    sites: Sites,
    batches: Sequence[Batch],
    metric: Metric,
    wanted: Mapping[int, Sequence[Intervention]],
    circuits: Sequence[str],
    progress: bool,
    checkpoint: Checkpoint | None = None,
    processes: Processes | None = None,
) -> tuple[dict[str, Tensor], float]:
    """Each circuit's scores `[layer, head]`, and the metric of the clean passes, means over all rows."""
    processes = processes or Processes(False)
    generators = Generators(model)
    compared = checkpoint is not None or processes.several
    question = question_of(model, batches, metric, wanted) if compared else {}
    count = sum(map(len, wanted.values()))
    ledger = Ledger(processes, checkpoint, question, len(batches), count)
    bar = tqdm(
        total=len(batches) * count,
        initial=ledger.kept.done,
        desc="score_heads",
        unit="freeze",
        disable=not progress or processes.rank > 0,
    )
    before = generators.states()
    try:
        with bar, ledger.open():
            for number, batch in enumerate(batches):
                _sweep(number, Passes(model, sites, batch, generators), metric, wanted, ledger, bar)
    finally:
        generators.put(before)
    return _table(sites, wanted, circuits, ledger.kept, sum(batch.rows for batch in batches))


def _sweep(
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
    with passes.running(any(left.values())):
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


def _table(
    sites: Sites, wanted: Mapping[int, Sequence[Intervention]], circuits: Sequence[str], kept: Kept, rows: int
) -> tuple[dict[str, Tensor], float]:
    most = max(site.heads for site in sites.by_layer.values())
    scores = {circuit: torch.full((sites.layers, most), torch.nan, dtype=torch.float64) for circuit in circuits}
    listed = [(layer, one) for layer, several in wanted.items() for one in several]
    for index, (layer, one) in enumerate(listed):
        for circuit, head in one.heads:
            scores[circuit][layer, head] = kept.change(index, rows)
    return scores, kept.clean_mean(rows)
