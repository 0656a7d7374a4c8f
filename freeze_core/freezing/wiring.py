"""What carries out the freezes of one layer, worked out before anything is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from freeze_core.attention.layout import Storage
from freeze_core.attention.shards import Shard, shard_of
from freeze_core.attention.sites import AttentionSite
from freeze_core.freezing.edits import Edit, edits_of, edits_of_z
from freeze_core.freezing.plan import LayerFreeze, assign, refuse_dependent, storage_for
from freeze_core.freezing.tracking import InForce
from freeze_core.vocabulary import FreezeType

__all__ = ["Wiring", "wire"]


@dataclass(frozen=True, eq=False)
class Wiring:
    """All that carries out the freezes of one layer, worked out before anything is touched.

    Args:
        freezes: in order, each with whom it belongs to.
        storage: how q, k and v are held meanwhile.
        edits: of each projection's output, by the projection's name.
        z_edits: of the output projection's input.
        shards: the stretch of each projection's output that this process has, where they are spread over several.
        z_shard: the same of the output projection's input.
        in_force: what the tracker of passes is told.
        spares_the_circuit: whether some edit wants the gradient of the attention without it.
        tells_runs_apart: whether some value was taken of one run of the layer, where a pass has several.
    """

    freezes: Sequence[tuple[Any, LayerFreeze]]
    storage: Storage
    edits: Mapping[str, Sequence[Edit]]
    z_edits: Sequence[Edit]
    shards: Mapping[str, Shard | None]
    z_shard: Shard | None
    in_force: InForce
    spares_the_circuit: bool
    tells_runs_apart: bool


def wire(site: AttentionSite, freezes: Sequence[tuple[Any, LayerFreeze]]) -> Wiring:
    """Works out what carries out `freezes`, in order, in the layer at `site`; some, or none.

    Raises:
        UnsupportedModelError: the layer cannot hold what is asked.
    """
    if not freezes:
        nothing = InForce(site.attention, "", (), unshared=False, needs_rows=False, on_stale="ignore")
        return Wiring((), site.layout.shared, {}, (), {}, None, nothing, False, False)
    in_order = [freeze for _, freeze in freezes]
    refuse_dependent(site, in_order)
    assignment = assign(site, in_order)
    storage = storage_for(site, assignment)
    chosen = [treatment for treatments in assignment.values() for treatment in treatments]
    key = " ".join("-" if treatment is None else treatment.key for treatment in chosen)
    in_force = InForce(
        attention=site.attention,
        key=f"{site.kind} {site.layer} {key}" if any(chosen) else "",
        wiring=tuple(chosen),
        unshared=storage is not site.layout.shared,
        needs_rows=any(treatment and treatment.freeze_type == FreezeType.RESAMPLE for treatment in chosen),
        on_stale=max((owner.on_stale_cache for owner, _ in freezes), key=("ignore", "warn", "error").index),
    )
    edits = {name: edits_of(site, storage, name, assignment) for name in storage.modules}
    shards = {name: shard_of(module, 0, site.layout.shared.widths[name]) for name, module in storage.modules.items()}
    z_shard = shard_of(site.layout.output, 1, site.layout.z.numel())
    return Wiring(
        freezes,
        storage,
        edits,
        edits_of_z(site, assignment),
        shards,
        z_shard,
        in_force,
        spares_the_circuit=any(edit.spares_the_circuit for several in edits.values() for edit in several),
        tells_runs_apart=any(one.treatment.reference or one.treatment.statistics for one in in_order),
    )
