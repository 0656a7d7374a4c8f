"""Configs resolved against a model: which treatment each head's activation gets. No tensors of a pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar, cast

from torch import Tensor

from freeze_core.activations import Recording
from freeze_core.attention.layout import Part, Storage
from freeze_core.attention.sites import AttentionSite, Sites
from freeze_core.config import InterventionConfig
from freeze_core.errors import InterventionError, UnsupportedModelError, shown
from freeze_core.identity import is_same_model, model_identity
from freeze_core.ordinary import ordinary_tensors
from freeze_core.statistics import ActivationStatistics, LayerStatistics, digest_of
from freeze_core.vocabulary import ROLES, BackwardMode, CircuitType, FreezeType, KVScope, Role

__all__ = [
    "Assignment",
    "LayerFreeze",
    "Reference",
    "Treatment",
    "assign",
    "refuse_dependent",
    "resolve",
    "storage_for",
]


@dataclass(frozen=True)
class Reference:
    """A layer's recorded activations by role and the padding masks `[batch, token]` they were recorded under.

    Copies: a live freeze does not change when the recording is written to.
    """

    activations: Mapping[Role, Tensor] = field(compare=False)
    masks: Mapping[Role, Tensor | None] = field(compare=False)
    digest: str


@dataclass(frozen=True)
class Treatment:
    """What is done to an activation. Fields that play no part in a freeze type are at their default."""

    freeze_type: FreezeType
    backward_mode: BackwardMode
    strength: float
    seed: int = 0
    noise_std: float | None = None
    statistics: LayerStatistics | None = None
    reference: Reference | None = None

    @property
    def key(self) -> str:
        """What decides the frozen value, as text."""
        calibrated = self.statistics.digest() if self.statistics else ""
        # Cross-attention under a reference reads keys and values from a cache, so that recordings must be told apart.
        recorded = self.reference.digest if self.reference else ""
        return f"{self.freeze_type} {self.strength} {self.seed:x} {self.noise_std} {calibrated} {recorded}"


@dataclass(frozen=True)
class LayerFreeze:
    """One config, resolved against one attention layer; `heads` are query heads."""

    layer: int
    roles: tuple[Role, ...]
    heads: tuple[int, ...]
    scope: KVScope
    treatment: Treatment


_T = TypeVar("_T")

Assignment = Mapping[Role, tuple[Treatment | None, ...]]
"""For each role, the treatment of what each query head reads, or writes; `None` is left alone."""


@ordinary_tensors()
def resolve(config: InterventionConfig, sites: Sites, roles: tuple[Role, ...] | None = None) -> list[LayerFreeze]:
    """What `config` asks of each attention layer; `roles`, if given, in the place of its circuit's.

    Raises:
        InterventionError: an index that is out of range or repeated, a layer without attention, or a reference or
            statistics that do not fit the model.
    """
    config = config.checked()
    if config.statistics is not None:
        _check_statistics(config.statistics, sites, config.attention)
    freezes = []
    roles = roles or CircuitType(config.circuit).roles
    for layer in _layers(config, sites):
        heads = sites.by_layer[layer].heads
        chosen = _in_range("head_indices", config.head_indices, heads, f"layer {layer} has {heads} query heads")
        freezes.append(
            LayerFreeze(
                layer,
                roles,
                chosen,
                KVScope(config.kv_scope),
                _treatment(config, sites.by_layer[layer], roles),
            )
        )
    return freezes


def _treatment(config: InterventionConfig, site: AttentionSite, roles: tuple[Role, ...]) -> Treatment:
    layer = site.layer
    freeze_type, mode = FreezeType(config.freeze_type), BackwardMode(config.backward_mode)
    if roles == ("z",) and mode == BackwardMode.CIRCUIT_STE:
        mode = BackwardMode.STE  # a circuit ends in z, so the two are the same there
    strength, seed = float(config.strength), int(config.seed)
    statistics = None if config.statistics is None else _of_layer("statistics", config.statistics, layer).copied()
    if statistics is not None:
        _check_sizes(statistics, site, roles)
    if freeze_type == FreezeType.NOISE:
        if config.noise_std is not None:
            return Treatment(freeze_type, mode, strength, seed, float(config.noise_std))
        return Treatment(freeze_type, mode, strength, seed, statistics=statistics)
    if freeze_type == FreezeType.RESAMPLE:
        return Treatment(freeze_type, mode, strength, seed)
    if freeze_type == FreezeType.MEAN:
        return Treatment(freeze_type, mode, strength, statistics=statistics)
    if freeze_type == FreezeType.REFERENCE:
        recording = cast(Recording, config.reference)
        recorded = _of_layer("reference", recording, layer)
        held = {role: _held(site, role, getattr(recorded, role)) for role in roles}
        masks = {role: None if (mask := recording.mask_of(role)) is None else mask.clone() for role in roles}
        reference = Reference(held, masks, digest_of(held[role] for role in roles))
        return Treatment(freeze_type, mode, strength, reference=reference)
    return Treatment(freeze_type, mode, strength)


def _check_sizes(statistics: LayerStatistics, site: AttentionSite, roles: tuple[Role, ...]) -> None:
    for role in roles:
        expected = [site.kv_heads if role in ("k", "v") else site.heads, site.layout.features(role)]
        for name, values in (("mean", statistics.mean), ("std", statistics.std)):
            found = list(values[role].shape) if role in values else []
            if found[-2:] != expected or len(found) > 3:
                raise InterventionError(
                    f"statistics: the {name} of {role} of layer {site.layer} is {found or 'missing'}, must be "
                    f"{expected} [head, head_dim], in front of them at most the run: calibrate this model"
                )


def _held(site: AttentionSite, role: Role, recorded: Tensor) -> Tensor:
    """A copy of a recorded activation `[..., token, head, head_dim]`, with the heads that the model itself has."""
    heads = site.kv_heads if role in ("k", "v") else site.heads
    expected = (heads, site.layout.features(role))
    if recorded.is_meta:
        raise InterventionError(f"reference: {role} of layer {site.layer} has no values: record it on another device")
    if role in ("k", "v") and recorded.shape[-2:] == (site.heads, expected[1]):  # recorded unshared
        grouped = recorded.unflatten(-2, (heads, site.group))
        if not bool((grouped == grouped[..., :1, :]).all()):
            raise InterventionError(
                f"reference: {role} of layer {site.layer} was recorded under kv_scope='head', with query heads that "
                "share a KV head each having their own: record it without that freeze"
            )
        recorded = grouped[..., 0, :]
    if tuple(recorded.shape[-2:]) != expected or recorded.dim() not in (4, 5):
        raise InterventionError(
            f"reference: {role} of layer {site.layer} is {list(recorded.shape)} [batch, token, head, head_dim] (before "
            f"them at most the run), and this model has heads {list(expected)}: record it on this model"
        )
    return recorded.detach().clone()


def _of_layer(field: str, values: Mapping[int, _T], layer: int) -> _T:
    if layer not in values:
        raise InterventionError(f"{field}={shown(values)}: holds nothing of layer {layer}, which is to be frozen")
    return values[layer]


def _check_statistics(statistics: ActivationStatistics, sites: Sites, attention: str) -> None:
    if statistics.attention != attention:
        raise InterventionError(
            f"statistics={shown(statistics)}: of {statistics.attention} attention, and attention={attention!r} is to "
            f"be frozen: calibrate with attention={attention!r}"
        )
    if not is_same_model(statistics.identity, sites, "statistics"):
        raise InterventionError(
            f"statistics={shown(statistics)}: of another model ({statistics.identity}, not {model_identity(sites)}), "
            "or of this one with other weights, another dtype or other adapters; calibrate this one"
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


def _layers(config: InterventionConfig, sites: Sites) -> list[int]:
    if config.layer_indices is None:
        if sites.refused:
            raise UnsupportedModelError(
                "layer_indices=None: not all attention layers can be frozen, "
                + "; ".join(f"layer {layer}: {reason}" for layer, reason in sites.refused.items())
                + f"; name layers of {sorted(sites.by_layer)}"
            )
        return sorted(sites.by_layer)
    layers = _in_range("layer_indices", config.layer_indices, sites.layers, f"the model has {sites.layers} layers")
    for layer in layers:
        if layer in sites.refused:
            raise UnsupportedModelError(f"layer_indices={shown(list(config.layer_indices))}: {sites.refused[layer]}")
        if layer not in sites.by_layer:
            raise InterventionError(
                f"layer_indices={shown(list(config.layer_indices))}: layer {layer} has no {config.attention} "
                f"attention; those that have: {sorted(sites.by_layer)}"
            )
    return list(layers)


def _in_range(field: str, indices: Sequence[int] | None, size: int, what: str) -> tuple[int, ...]:
    if indices is None:
        return tuple(range(size))
    for index in indices:
        if not -size <= index < size:
            raise InterventionError(
                f"{field}={shown(list(indices))}: {shown(index)} is out of range; {what}, so {-size} to "
                f"{size - 1} are allowed"
            )
    resolved = tuple(int(index) % size for index in indices)
    if len(set(resolved)) < len(resolved):
        raise InterventionError(f"{field}={shown(list(indices))}: names the same one twice ({what})")
    return resolved
