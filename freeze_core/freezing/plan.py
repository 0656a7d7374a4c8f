"""Configs resolved against a model: which treatment each head's activation gets. Pure data, no tensors of a pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from freeze_core.attention.sites import AttentionSite, Sites
from freeze_core.attention.storages import Part, Storage
from freeze_core.config import BackwardMode, CircuitType, FreezeType, InterventionConfig, KVScope, Role
from freeze_core.errors import InterventionError, UnsupportedModelError

__all__ = ["Assignment", "LayerFreeze", "Treatment", "assign", "resolve", "storage_for"]


@dataclass(frozen=True)
class Treatment:
    """What is done to an activation, whichever it is."""

    freeze_type: FreezeType
    backward_mode: BackwardMode
    strength: float
    seed: int
    noise_std: float | None

    @property
    def needs_statistics(self) -> bool:
        """Whether the replacement is made of statistics of the pass itself."""
        return self.freeze_type == FreezeType.MEAN or (self.freeze_type == FreezeType.NOISE and self.noise_std is None)

    @property
    def needs_pass(self) -> bool:
        """Whether the replacement depends on the pass that is running: its padding, its columns."""
        return self.freeze_type != FreezeType.ZERO


@dataclass(frozen=True)
class LayerFreeze:
    """One config, resolved against one attention layer; `heads` are query heads."""

    layer: int
    roles: tuple[Role, ...]
    heads: tuple[int, ...]
    scope: KVScope
    treatment: Treatment


Assignment = Mapping[Role, tuple[Treatment | None, ...]]
"""For each role, the treatment of what each query head reads; `None` is left alone."""


def resolve(config: InterventionConfig, sites: Sites) -> list[LayerFreeze]:
    """What `config` asks of each attention layer.

    Raises:
        InterventionError: an index that is out of range or repeated, or a layer without attention.
    """
    config = config.checked()
    freeze_type = FreezeType(config.freeze_type)
    noisy = freeze_type == FreezeType.NOISE
    treatment = Treatment(
        freeze_type,
        BackwardMode(config.backward_mode),
        float(config.strength),
        int(config.seed) if noisy else 0,
        float(config.noise_std) if noisy and config.noise_std is not None else None,
    )
    freezes = []
    for layer in _layers(config, sites):
        heads = sites.by_layer[layer].heads
        chosen = _in_range("head_indices", config.head_indices, heads, f"layer {layer} has {heads} query heads")
        freezes.append(
            LayerFreeze(layer, CircuitType(config.circuit).roles, chosen, KVScope(config.kv_scope), treatment)
        )
    return freezes


def assign(site: AttentionSite, freezes: Sequence[LayerFreeze]) -> Assignment:
    """The freezes of one layer in order, the later one winning where they meet."""
    assignment: dict[Role, list[Treatment | None]] = {role: [None] * site.heads for role in ("q", "k", "v")}
    for freeze in freezes:
        # At strength 0 the activation is the unfrozen one, bit for bit, whatever came before.
        treatment = freeze.treatment if freeze.treatment.strength > 0 else None
        groups = {head // site.group for head in freeze.heads}
        for role in freeze.roles:
            for head in range(site.heads):
                shared = role != "q" and freeze.scope == KVScope.GROUP
                if head // site.group in groups if shared else head in freeze.heads:
                    assignment[role][head] = treatment
    return {role: tuple(treatments) for role, treatments in assignment.items()}


def storage_for(site: AttentionSite, assignment: Assignment) -> Storage:
    """The storage in which the assignment can be carried out: unshared only where what is shared is treated unevenly.

    Raises:
        UnsupportedModelError: they would have to be unshared and the attention has no such path.
    """
    uneven = [part.module for role, part in _parts(site.layout.shared) if not _even(site, assignment[role], part)]
    if not uneven:
        return site.layout.shared
    if site.layout.unshared is None:
        raise UnsupportedModelError(
            f"layer {site.layer}: {site.name} ({type(site.attention).__name__}) cannot give query heads that share "
            f"features of {', '.join(uneven)} their own; freeze all the heads that share them, or use kv_scope='group'"
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


def _layers(config: InterventionConfig, sites: Sites) -> list[int]:
    if config.layer_indices is None:
        if sites.refused:
            raise UnsupportedModelError(
                "layer_indices=None: not all attention layers can be frozen, "
                + "; ".join(f"layer {layer}: {reason}" for layer, reason in sites.refused.items())
                + f"; name layers of {sorted(sites.by_layer)}"
            )
        return sorted(sites.by_layer)
    layers = _in_range(
        "layer_indices", config.layer_indices, sites.layers, f"the model has {sites.layers} decoder layers"
    )
    for layer in layers:
        if layer in sites.refused:
            raise UnsupportedModelError(f"layer_indices={list(config.layer_indices)}: {sites.refused[layer]}")
        if layer not in sites.by_layer:
            raise InterventionError(
                f"layer_indices={list(config.layer_indices)}: layer {layer} has no attention; those that have: "
                f"{sorted(sites.by_layer)}"
            )
    return list(layers)


def _in_range(field: str, indices: Sequence[int] | None, size: int, what: str) -> tuple[int, ...]:
    if indices is None:
        return tuple(range(size))
    for index in indices:
        if not -size <= index < size:
            raise InterventionError(
                f"{field}={list(indices)}: {index} is out of range; {what}, so {-size} to {size - 1} are allowed"
            )
    resolved = tuple(int(index) % size for index in indices)
    if len(set(resolved)) < len(resolved):
        raise InterventionError(f"{field}={list(indices)}: names the same one twice ({what})")
    return resolved
