"""The exact sweep: each head's circuit frozen in a forward of its own, equal ones once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from freeze_core.attention.sites import Sites
from freeze_core.config import InterventionConfig
from freeze_core.freezing.plan import LayerFreeze, assign, refuse_dependent, resolve
from freeze_core.scoring.batches import Batch
from freeze_core.scoring.generators import Generators
from freeze_core.scoring.metrics import Metric
from freeze_core.scoring.passes import Passes
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
) -> tuple[dict[str, Tensor], float]:
    """Each circuit's scores `[layer, head]`, and the metric of the clean passes, means over all rows."""
    most = max(site.heads for site in sites.by_layer.values())
    sums = {circuit: torch.full((sites.layers, most), torch.nan, dtype=torch.float64) for circuit in circuits}
    for layer, several in wanted.items():
        for one in several:
            for circuit, head in one.heads:
                sums[circuit][layer, head] = 0.0
    clean_sum = 0.0
    rows = sum(batch.rows for batch in batches)
    generators = Generators(model)
    total = len(batches) * sum(map(len, wanted.values()))
    before = generators.states()
    try:
        with tqdm(total=total, desc="score_heads", unit="freeze", disable=not progress) as bar:
            for number, batch in enumerate(batches):
                passes = Passes(model, sites, batch, generators)
                with passes.running():
                    clean = metric.rows(number, batch, passes.clean, passes.clean, "unfrozen")
                    clean_sum += float(clean.sum())
                    for layer, several in wanted.items():
                        frozen = passes.frozen(layer, [one.freeze for one in several])
                        for one, logits in zip(several, frozen, strict=True):
                            where = f"under {' and '.join(f'{name} of {head}' for name, head in one.heads)} of {layer}"
                            change = metric.rows(number, batch, logits, passes.clean, where) - clean
                            for circuit, head in one.heads:
                                sums[circuit][layer, head] += float(change.sum())
                            bar.update()
    finally:
        generators.put(before)
    return {circuit: values / rows for circuit, values in sums.items()}, clean_sum / rows
