"""What is done in each layer, worked out before a model is touched: which edits of which modules, for which heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from freeze_core.attention.layout import AttentionSite, Part, Storage
from freeze_core.attention.shards import Shard, shard_of
from freeze_core.errors import UnsupportedModelError
from freeze_core.freezing.edits import Edit, Treatment, edits_of
from freeze_core.freezing.module_features import features_of_projection, features_of_z
from freeze_core.freezing.pass_tracker import InForce
from freeze_core.vocabulary import ROLES, KVScope, Role

__all__ = ["Assignment", "LayerFreeze", "LayerPlan", "assign", "plan_layer", "refuse_dependent", "storage_for"]


@dataclass(frozen=True)
class LayerFreeze:
    """One config, resolved against one attention layer; `heads` are query heads."""

    layer: int
    roles: tuple[Role, ...]
    heads: tuple[int, ...]
    scope: KVScope
    treatment: Treatment


Assignment = Mapping[Role, tuple[Treatment | None, ...]]
"""For each role, the treatment of what each query head reads, or writes; `None` is left alone."""


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """All that carries out the freezes of one layer.

    Args:
        freezes: in order, each with its owner.
        storage: how q, k and v are stored meanwhile.
        edits: of each projection's output, by the projection's name.
        z_edits: of the output projection's input.
        shards: the stretch of each projection's output that this process has, where they are spread over several.
        z_shard: the same of the output projection's input.
        in_force: what the tracker of passes is told.
        differs_by_run: whether a value is of one run of the layer, where a pass has several.
    """

    freezes: Sequence[tuple[Any, LayerFreeze]]
    storage: Storage
    edits: Mapping[str, Sequence[Edit]]
    z_edits: Sequence[Edit]
    shards: Mapping[str, Shard | None]
    z_shard: Shard | None
    in_force: InForce
    differs_by_run: bool

    @property
    def needs_clean_backward(self) -> bool:
        """Whether gradients must flow as if some edit had not been made."""
        return any(edit.needs_clean_backward for edits in self.edits.values() for edit in edits)


def plan_layer(site: AttentionSite, freezes: Sequence[tuple[Any, LayerFreeze]]) -> LayerPlan:
    """Works out how `freezes`, in order, each with its owner, are carried out in the layer at `site`; or no freezes.

    Raises:
        UnsupportedModelError: the layer cannot hold what is requested.
    """
    in_order = [freeze for _, freeze in freezes]
    refuse_dependent(site, in_order)
    assignment = assign(site, in_order)
    storage = storage_for(site, assignment)
    widths = site.layout.shared.widths
    return LayerPlan(
        freezes,
        storage,
        {name: edits_of(features_of_projection(site, storage, name), assignment) for name in storage.modules},
        edits_of(features_of_z(site), assignment),
        {name: shard_of(module, 0, widths[name]) for name, module in storage.modules.items()},
        shard_of(site.layout.output, 1, site.layout.z.numel()),
        _in_force(site, assignment, storage, [owner.on_stale_cache for owner, _ in freezes]),
        any(freeze.treatment.replacement.differs_by_run for freeze in in_order),
    )


def _in_force(site: AttentionSite, assignment: Assignment, storage: Storage, on_stale: Sequence[str]) -> InForce:
    chosen = tuple(treatment for treatments in assignment.values() for treatment in treatments)
    key = " ".join("-" if treatment is None else treatment.key for treatment in chosen)
    return InForce(
        module=site.attention,
        key=f"{site.kind} {site.layer} {key}" if any(chosen) else "",
        treatments=chosen,
        per_head_kv=storage is not site.layout.shared,
        reads_other_rows=any(treatment and treatment.replacement.reads_other_rows for treatment in chosen),
        on_stale=max(on_stale, key=("ignore", "warn", "error").index, default="ignore"),
    )


def assign(site: AttentionSite, freezes: Sequence[LayerFreeze]) -> Assignment:
    """The freezes of one layer in order, the later one winning where they meet."""
    assignment: dict[Role, list[Treatment | None]] = {role: [None] * site.heads for role in ROLES}
    for freeze in freezes:
        # At strength 0 the activation is the unfrozen one, bit for bit, whatever came before.
        treatment = freeze.treatment if freeze.treatment.strength > 0 else None
        groups = {head // site.group for head in freeze.heads}
        for role in freeze.roles:
            shared = role in ("k", "v") and freeze.scope == KVScope.GROUP
            for head in range(site.heads):
                if head // site.group in groups if shared else head in freeze.heads:
                    assignment[role][head] = treatment
    return {role: tuple(treatments) for role, treatments in assignment.items()}


def refuse_dependent(site: AttentionSite, freezes: Sequence[LayerFreeze]) -> None:
    """Raises `UnsupportedModelError` where one of `freezes` cannot be carried out without the others.

    Each may be the last that is left, since they are removed in any order; each covers what is shared, or none does.
    """
    for freeze in freezes:
        full = replace(freeze, treatment=replace(freeze.treatment, strength=1.0))  # one of strength 0 uncovers others
        storage_for(site, assign(site, [full]))


def storage_for(site: AttentionSite, assignment: Assignment) -> Storage:
    """The storage in which the assignment can be carried out: unshared only where what is shared is treated unevenly.

    Raises:
        UnsupportedModelError: they would have to be unshared and the attention has no such path.
    """
    uneven = [part.module for role, part in _parts(site.layout.shared) if not _even(site, assignment[role], part)]
    if not uneven:
        return site.layout.shared
    if site.layout.unshared is None:
        other = ", or use kv_scope='group'" if site.group > 1 else ""
        raise UnsupportedModelError(
            f"layer {site.layer}: {site.name} ({type(site.attention).__name__}) cannot give query heads that share "
            f"features of {', '.join(uneven)} their own; freeze all the heads that share them, in one config{other}"
        )
    return site.layout.unshared


def _parts(storage: Storage) -> Iterator[tuple[Role, Part]]:
    for role, parts in storage.features.items():
        for part in parts:
            yield role, part


def _even(site: AttentionSite, treatments: Sequence[Treatment | None], part: Part) -> bool:
    """Whether all query heads that share a head of this part are treated alike."""
    sharing = site.heads // len(part.features)
    return all(len(set(treatments[start : start + sharing])) == 1 for start in range(0, site.heads, sharing))
