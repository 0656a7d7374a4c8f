"""Turns a config into freezes of single layers, after checking it against the model. No tensors of a pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from freeze_core.activations import Recording
from freeze_core.attention.layout import AttentionSite, Sites
from freeze_core.config import InterventionConfig
from freeze_core.errors import InterventionError, UnsupportedModelError, shown
from freeze_core.freezing.edits import Treatment
from freeze_core.freezing.plan import LayerFreeze
from freeze_core.freezing.replacements import REPLACEMENTS, Reference
from freeze_core.identity import is_same_model, model_identity
from freeze_core.ordinary import ordinary_tensors
from freeze_core.statistics import ActivationStatistics, LayerStatistics, digest_of
from freeze_core.vocabulary import BackwardMode, CircuitType, FreezeType, KVScope, Role

__all__ = ["resolve"]

_T = TypeVar("_T")


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
    mode = BackwardMode(config.backward_mode)
    if roles == ("z",) and mode == BackwardMode.CIRCUIT_STE:
        mode = BackwardMode.STE  # a circuit ends in z, so the two are the same there
    statistics = None if config.statistics is None else _layer_statistics(config.statistics, site, roles)
    reference = None if config.reference is None else _layer_reference(config.reference, site, roles)
    replacement = REPLACEMENTS[FreezeType(config.freeze_type)].from_config(config, statistics, reference)
    return Treatment(replacement, mode, float(config.strength))


def _layer_statistics(
    statistics: ActivationStatistics, site: AttentionSite, roles: tuple[Role, ...]
) -> LayerStatistics:
    values = _of_layer("statistics", statistics, site.layer).copied()
    _check_sizes(values, site, roles)
    return values


def _layer_reference(recording: Recording, site: AttentionSite, roles: tuple[Role, ...]) -> Reference:
    recorded = _of_layer("reference", recording, site.layer)
    activations = {role: _own_heads(site, role, getattr(recorded, role)) for role in roles}
    masks = {role: None if (mask := recording.mask_of(role)) is None else mask.clone() for role in roles}
    return Reference(activations, masks, digest_of(activations[role] for role in roles))


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


def _own_heads(site: AttentionSite, role: Role, recorded: Tensor) -> Tensor:
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
