"""What a sweep is to do: which freezes of which heads, over which batches, scored by which metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from freeze_core.attention.layout import Sites
from freeze_core.config import InterventionConfig
from freeze_core.errors import InterventionError, shown
from freeze_core.freezing.plan import LayerFreeze, assign, refuse_dependent
from freeze_core.freezing.requests import resolve
from freeze_core.scoring.batches import Batch
from freeze_core.scoring.metrics import Metric
from freeze_core.vocabulary import ROLES, CircuitType

__all__ = ["CIRCUITS", "Intervention", "Sweep", "circuits_of", "interventions"]

CIRCUITS = (*CircuitType, "z")
"""What can be frozen of a head by itself; `z` is all of it."""


def circuits_of(circuits: object) -> list[str]:
    """The names of `circuits`.

    Raises:
        InterventionError: they are not a list of distinct, known circuits.
    """
    names = [] if isinstance(circuits, str) or not isinstance(circuits, Sequence) else list(circuits)
    known = all(isinstance(name, str) and name in CIRCUITS for name in names)
    if not names or not known or len(set(names)) < len(names):
        raise InterventionError(f"circuits={shown(circuits)}: must be a list of distinct ones of {', '.join(CIRCUITS)}")
    return [str(name) for name in names]


@dataclass
class Intervention:
    """One freeze, and the heads that it is the freeze of: `(circuit, head)`."""

    freeze: LayerFreeze
    heads: list[tuple[str, int]] = field(default_factory=list)


def interventions(sites: Sites, configs: Mapping[str, InterventionConfig]) -> dict[int, list[Intervention]]:
    """The freezes of each layer, one a head and circuit; those that have the same effect are one intervention.

    Args:
        configs: by circuit; the heads that a config chooses are frozen one by one.

    Raises:
        CircuitFreezeError: a config is not supported by the model.
    """
    by_layer: dict[int, dict[object, Intervention]] = {}
    for circuit, config in configs.items():
        for whole in resolve(config, sites, roles=("z",) if circuit == "z" else None):
            site = sites.by_layer[whole.layer]
            for head in whole.heads:
                freeze = replace(whole, heads=(head,))
                refuse_dependent(site, [freeze])
                assignment = assign(site, [freeze])
                effect = tuple(assignment[role] for role in ROLES)
                same = by_layer.setdefault(whole.layer, {}).setdefault(effect, Intervention(freeze))
                same.heads.append((circuit, head))
    return {layer: list(by_layer[layer].values()) for layer in sorted(by_layer)}


@dataclass(frozen=True, eq=False)
class Sweep:
    """One sweep over the heads of a model.

    Args:
        model: unfrozen.
        sites: its attention layers.
        batches: what it is run on.
        metric: what is scored.
        wanted: the interventions of each layer.
        circuits: the names of those that are scored, each a table of its own.
        show_progress: whether a bar is shown.
    """

    model: nn.Module
    sites: Sites
    batches: Sequence[Batch]
    metric: Metric
    wanted: Mapping[int, Sequence[Intervention]]
    circuits: Sequence[str]
    show_progress: bool

    @property
    def rows(self) -> int:
        """Of all batches."""
        return sum(batch.rows for batch in self.batches)

    @property
    def placed(self) -> list[tuple[int, Intervention]]:
        """All interventions with their layers, in order."""
        return [(layer, one) for layer, several in self.wanted.items() for one in several]

    def table(self, values: Sequence[float]) -> dict[str, Tensor]:
        """By circuit the value of each head, `[layer, head]` in float64, nan where there is none.

        Args:
            values: one for each of `placed`.
        """
        heads = max(site.heads for site in self.sites.by_layer.values())
        shape = (self.sites.layers, heads)
        scores = {circuit: torch.full(shape, torch.nan, dtype=torch.float64) for circuit in self.circuits}
        for (layer, one), value in zip(self.placed, values, strict=True):
            for circuit, head in one.heads:
                scores[circuit][layer, head] = value
        return scores
