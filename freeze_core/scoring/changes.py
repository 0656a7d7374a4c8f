"""Which freezes of a layer tell what each intervention does to the z of its heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from freeze_core.attention.layout import AttentionSite
from freeze_core.freezing.edits import Treatment
from freeze_core.freezing.plan import LayerFreeze, assign
from freeze_core.vocabulary import ROLES, KVScope

__all__ = ["Changes", "apart", "together"]


@dataclass(frozen=True, eq=False)
class Changes:
    """Freezes of one layer, and of each intervention the heads whose z changes as under one of them.

    Args:
        site: the layer.
        wanted: the freeze of each intervention.
        freezes: what tells of them.
        parts: for each intervention and freeze the heads that have the z that they have under that freeze.
    """

    site: AttentionSite
    wanted: Sequence[LayerFreeze]
    freezes: Sequence[LayerFreeze]
    parts: Sequence[Mapping[int, Sequence[int]]]

    def total(self, intervention: int, by_freeze: Sequence[Tensor]) -> float:
        """The sum over the heads that it changes of what is told of each freeze, `[head]`."""
        heads = self.parts[intervention]
        return sum(float(by_freeze[freeze][list(heads[freeze])].sum()) for freeze in heads)

    def z(self, intervention: int, clean: Tensor, by_freeze: Sequence[Tensor]) -> Tensor:
        """The z `[..., feature]` under an intervention, put together of the clean one and that under each freeze."""
        z = clean.clone()
        for freeze, heads in self.parts[intervention].items():
            features = self.site.layout.z[list(heads)].flatten()
            z[..., features] = by_freeze[freeze][..., features]
        return z


def together(site: AttentionSite, wanted: Sequence[LayerFreeze]) -> Changes:
    """Freezes of all heads at once, which tell of each intervention if a head's z is made of its own q, k and v."""
    freezes: dict[tuple[Treatment | None, ...], LayerFreeze] = {}
    parts = []
    for one in wanted:
        assignment = assign(site, [one])
        heads: dict[int, list[int]] = {}
        for head in range(site.heads):
            own = tuple(assignment[role][head] for role in ROLES)
            roles = tuple(role for role, treatment in zip(ROLES, own, strict=True) if treatment)
            if roles:
                every = replace(one, roles=roles, heads=tuple(range(site.heads)), scope=KVScope.HEAD)
                freezes.setdefault(own, every)
                heads.setdefault(list(freezes).index(own), []).append(head)
        parts.append(heads)
    return Changes(site, wanted, list(freezes.values()), parts)


def apart(site: AttentionSite, wanted: Sequence[LayerFreeze]) -> Changes:
    """A freeze for each intervention, where what is frozen of one head changes the z of others."""
    return Changes(site, wanted, wanted, [{number: range(site.heads)} for number in range(len(wanted))])
