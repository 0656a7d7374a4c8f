"""Which freezes of a layer show what each intervention does to the z of its heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from freeze_core.attention.layout import AttentionSite
from freeze_core.freezing.edits import Treatment
from freeze_core.freezing.plan import LayerFreeze, assign
from freeze_core.vocabulary import ROLES, KVScope

__all__ = ["ZDecomposition", "freeze_all_heads", "freeze_one_by_one"]


@dataclass(frozen=True, eq=False)
class ZDecomposition:
    """Freezes of one layer, and of each intervention the heads whose z changes as under one of them.

    Args:
        site: the layer.
        wanted: the freeze of each intervention.
        freezes: those that are run.
        heads: for each intervention, by the index of a run freeze, the heads whose z is as under that freeze.
    """

    site: AttentionSite
    wanted: Sequence[LayerFreeze]
    freezes: Sequence[LayerFreeze]
    heads: Sequence[Mapping[int, Sequence[int]]]

    def total(self, intervention: int, effects: Sequence[Tensor]) -> float:
        """The sum of `effects`, one `[head]` for each run freeze, over the heads that an intervention changes."""
        parts = self.heads[intervention].items()
        return sum(float(effects[freeze][list(heads)].sum()) for freeze, heads in parts)

    def z(self, intervention: int, clean: Tensor, frozen: Sequence[Tensor]) -> Tensor:
        """The z `[..., feature]` under an intervention, composed of the clean one and that under each run freeze."""
        z = clean.clone()
        for freeze, heads in self.heads[intervention].items():
            features = self.site.layout.z[list(heads)].flatten()
            z[..., features] = frozen[freeze][..., features]
        return z


def freeze_all_heads(site: AttentionSite, wanted: Sequence[LayerFreeze]) -> ZDecomposition:
    """Freezes of all heads at once. They show every intervention if a head's z depends on its own q, k and v alone."""
    freezes: dict[tuple[Treatment | None, ...], LayerFreeze] = {}
    by_intervention = []
    for one in wanted:
        assignment = assign(site, [one])
        heads: dict[int, list[int]] = {}
        for head in range(site.heads):
            treatments = tuple(assignment[role][head] for role in ROLES)
            roles = tuple(role for role, treatment in zip(ROLES, treatments, strict=True) if treatment)
            if roles:
                everywhere = replace(one, roles=roles, heads=tuple(range(site.heads)), scope=KVScope.HEAD)
                freezes.setdefault(treatments, everywhere)
                heads.setdefault(list(freezes).index(treatments), []).append(head)
        by_intervention.append(heads)
    return ZDecomposition(site, wanted, list(freezes.values()), by_intervention)


def freeze_one_by_one(site: AttentionSite, wanted: Sequence[LayerFreeze]) -> ZDecomposition:
    """A freeze for each intervention, where what is frozen of one head changes the z of others."""
    return ZDecomposition(site, wanted, wanted, [{number: range(site.heads)} for number in range(len(wanted))])
