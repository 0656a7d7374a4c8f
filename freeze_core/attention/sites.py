"""Finds, in any model, each attention layer and where its heads' q, k, v and z live."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from freeze_core.attention.families import (
    FUSED,
    HARMLESS_CHILDREN,
    HARMLESS_PARAMETERS,
    OUTPUTS,
    SEPARATE,
    FusedStorage,
)
from freeze_core.attention.layout import fused_layout, plain_layout, widened
from freeze_core.config import ModelArchitecture, Role
from freeze_core.errors import UnsupportedModelError

__all__ = ["AttentionSite", "Sites", "Storage", "find_sites"]


@dataclass(frozen=True, eq=False)
class Storage:
    """One way in which an attention layer can hold its q, k and v.

    Args:
        modules: the modules whose outputs hold q, k and v, by name.
        features: for each role the module's name and the feature index `[heads, head_dim]` into its output.
        sources: for each module whose output is widened, the feature `[wide features]` that each one repeats.
        attributes: what the attention module's attributes must be for its own code to read this storage.
    """

    modules: Mapping[str, nn.Module]
    features: Mapping[Role, tuple[str, Tensor]]
    sources: Mapping[str, Tensor] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """One attention layer: its modules and head counts.

    `shared` is the storage that the model came with. `unshared` has one KV head for each query head; it is
    `None` where nothing is shared, or where the module's code has no such path.
    """

    layer: int
    name: str
    attention: nn.Module
    output: nn.Module
    architecture: ModelArchitecture
    heads: int
    kv_heads: int
    head_dim: int
    shared: Storage
    unshared: Storage | None

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True, eq=False)
class Sites:
    """The attention layers of one model.

    Args:
        layers: number of decoder layers, attention or not; indices count these.
        stack: the module that holds the decoder layers and so sees each pass's mask and cache.
        by_layer: the attention layers.
    """

    layers: int
    stack: nn.Module
    by_layer: Mapping[int, AttentionSite]


def find_sites(model: nn.Module, architecture: ModelArchitecture | None = None) -> Sites:
    """The attention layers of `model`.

    Args:
        model: a Hugging Face model, or any module that holds one.
        architecture: how q, k and v are stored, stated by hand: it vouches for attention classes that are not
            known, and is checked against what the model has.

    Raises:
        UnsupportedModelError: no attention, or an attention that cannot be served, with the reason.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"model is a {type(model).__name__}: must be a torch.nn.Module")
    _refuse_wrappers(model)
    found = list(_attention_modules(model))
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no attention layer with projections to freeze: no layer of a ModuleList "
            f"holds {', '.join(SEPARATE)} or a known fused projection ({', '.join(FUSED)})"
        )
    stacks = {prefix for prefix, _, _, _ in found}
    if len(stacks) > 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} has attention in several stacks of layers ({', '.join(sorted(stacks))}): "
            "only models with one stack of decoder layers are served; pass the one to freeze, such as its decoder"
        )
    by_layer: dict[int, AttentionSite] = {}
    for _, layer, name, attention in found:
        if layer in by_layer:
            raise UnsupportedModelError(
                f"layer {layer} has two attention modules, {by_layer[layer].name} and {name}: "
                "only self-attention alone is served"
            )
        by_layer[layer] = _site(layer, name, attention, architecture)
    (prefix,) = stacks
    layers = cast(nn.ModuleList, model.get_submodule(prefix))
    return Sites(len(layers), model.get_submodule(prefix.rpartition(".")[0]), by_layer)


def _refuse_wrappers(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule | nn.DataParallel):
            raise UnsupportedModelError(
                f"{name or 'the model'} is a {type(module).__name__}, which does not run the modules that a freeze "
                "replaces: freeze the model before it is scripted or replicated, without that wrapper"
            )


def _attention_modules(model: nn.Module) -> Iterator[tuple[str, int, str, nn.Module]]:
    """Path of the list of layers, layer index, path and module of each attention."""
    for name, module in model.named_modules():
        if not (_fused_entry(module) or _has_separate(module)):
            continue
        parts = name.split(".")
        for depth in range(len(parts) - 1, 0, -1):
            prefix = ".".join(parts[:depth])
            if parts[depth].isdecimal() and isinstance(model.get_submodule(prefix), nn.ModuleList):
                yield prefix, int(parts[depth]), name, module
                break


def _fused_entry(module: nn.Module) -> FusedStorage | None:
    for cls in type(module).__mro__:
        entry = FUSED.get(cls.__name__)
        if entry is not None and entry.projection in dict(module.named_children()):
            return entry
    return None


def _has_separate(module: nn.Module) -> bool:
    return set(SEPARATE) <= {name for name, _ in module.named_children()}


def _site(layer: int, name: str, attention: nn.Module, architecture: ModelArchitecture | None) -> AttentionSite:
    live = getattr(getattr(attention.forward, "__self__", None), "site", None)
    if isinstance(live, AttentionSite):  # frozen already: its attributes may be those of the unshared storage
        return live
    entry = _fused_entry(attention)
    stored = ModelArchitecture.FUSED_QKV if entry else ModelArchitecture.SEPARATE_QKV
    if architecture not in (None, stored):
        raise UnsupportedModelError(
            f"architecture={str(architecture)!r}: {name} ({type(attention).__name__}) contradicts it, it is {stored}"
        )
    where = f"{name} ({type(attention).__name__})"
    if entry:
        return _fused_site(layer, name, where, attention, entry)
    if architecture is None:
        _refuse_unknown_parts(where, attention)
    return _separate_site(layer, name, where, attention)


def _fused_site(layer: int, name: str, where: str, attention: nn.Module, entry: FusedStorage) -> AttentionSite:
    heads, kv_heads, head_dim = entry.heads(attention), entry.kv_heads(attention), _head_dim(where, attention)
    modules = {entry.projection: attention.get_submodule(entry.projection)}
    output = attention.get_submodule(entry.output)
    expected = (heads + 2 * kv_heads) * head_dim
    if _width(modules[entry.projection]) != expected:
        raise UnsupportedModelError(
            f"{where}: {entry.projection} gives {_width(modules[entry.projection])} features, but {heads} query and "
            f"{kv_heads} KV heads of {head_dim} features make {expected}"
        )
    layout = fused_layout(heads, kv_heads, head_dim, entry.blocks(attention))
    shared = Storage(modules, {role: (entry.projection, index) for role, index in layout.items()})
    unshared = None
    if kv_heads < heads and entry.unshared and entry.unshared_blocks:
        wide = fused_layout(heads, heads, head_dim, entry.unshared_blocks(attention))
        unshared = Storage(
            modules,
            {role: (entry.projection, index) for role, index in wide.items()},
            {entry.projection: widened(layout, wide)},
            entry.unshared(attention),
        )
    return AttentionSite(
        layer,
        name,
        attention,
        output,
        ModelArchitecture.FUSED_QKV,
        heads,
        kv_heads,
        head_dim,
        shared,
        unshared,
    )


def _separate_site(layer: int, name: str, where: str, attention: nn.Module) -> AttentionSite:
    head_dim = _head_dim(where, attention)
    widths = {role: _width(attention.get_submodule(f"{role}_proj")) for role in ("q", "k", "v")}
    output = next((child for key, child in attention.named_children() if key in OUTPUTS), None)
    heads, kv_heads = widths["q"] // head_dim, widths["k"] // head_dim
    if output is None or widths["k"] != widths["v"] or heads * head_dim != widths["q"] or heads % max(kv_heads, 1):
        raise UnsupportedModelError(
            f"{where}: projections of {widths} features and heads of {head_dim} features with an output projection "
            f"({'missing' if output is None else 'present'}) are not plain multi-head or grouped-query attention"
        )
    if _width_in(output) != heads * head_dim:
        raise UnsupportedModelError(
            f"{where}: q_proj gives {heads} heads of {head_dim} features, but the output projection takes "
            f"{_width_in(output)}: q_proj holds more than queries (an output gate, say)"
        )
    modules = {f"{role}_proj": _activation_module(attention, role, head_dim) for role in ("q", "k", "v")}
    shared = Storage(
        modules,
        {
            "q": ("q_proj", plain_layout(heads, head_dim)),
            "k": ("k_proj", plain_layout(kv_heads, head_dim)),
            "v": ("v_proj", plain_layout(kv_heads, head_dim)),
        },
    )
    unshared = _unshared_separate(attention, shared, heads, kv_heads, head_dim)
    return AttentionSite(
        layer,
        name,
        attention,
        output,
        ModelArchitecture.SEPARATE_QKV,
        heads,
        kv_heads,
        head_dim,
        shared,
        unshared,
    )


def _unshared_separate(
    attention: nn.Module, shared: Storage, heads: int, kv_heads: int, head_dim: int
) -> Storage | None:
    """The module's own code repeats KV heads `num_key_value_groups` times: repeat them before it does."""
    if kv_heads == heads or getattr(attention, "num_key_value_groups", None) != heads // kv_heads:
        return None
    wide = plain_layout(heads, head_dim)
    source = widened({"k": shared.features["k"][1]}, {"k": wide})
    attributes = {"num_key_value_groups": 1}
    if hasattr(attention, "num_key_value_heads"):
        attributes["num_key_value_heads"] = heads
    features = {**shared.features, "k": ("k_proj", wide), "v": ("v_proj", wide)}
    return Storage(shared.modules, features, {"k_proj": source, "v_proj": source}, attributes)


def _activation_module(attention: nn.Module, role: str, head_dim: int) -> nn.Module:
    """The projection, or the norm behind it where that spans all heads: before it heads are not separate."""
    projection = attention.get_submodule(f"{role}_proj")
    norm = getattr(attention, f"{role}_norm", None)
    weight = getattr(norm, "weight", None)
    if isinstance(weight, Tensor) and weight.numel() == _width(projection) != head_dim:
        return cast(nn.Module, norm)
    return projection


def _refuse_unknown_parts(where: str, attention: nn.Module) -> None:
    known = {*SEPARATE, *OUTPUTS, *HARMLESS_CHILDREN}
    unknown = [name for name, _ in attention.named_children() if name not in known]
    unknown += [name for name, _ in attention.named_parameters(recurse=False) if name not in HARMLESS_PARAMETERS]
    if getattr(attention, "is_kv_shared_layer", False):
        unknown.append("is_kv_shared_layer")
    if unknown:
        raise UnsupportedModelError(
            f"{where}: it is not known what {', '.join(unknown)} does between the projections and the attention; "
            "if q_proj, k_proj and v_proj are what attention reads, say so with architecture='separate_qkv'"
        )


def _head_dim(where: str, attention: nn.Module) -> int:
    head_dim = getattr(attention, "head_dim", None)
    if not isinstance(head_dim, int) or head_dim < 1:
        raise UnsupportedModelError(f"{where} has no attribute head_dim that says how many features a head has")
    return head_dim


def _width(projection: nn.Module) -> int:
    """Features that a linear layer gives: `out_features`, or `nf` of transformers' Conv1D."""
    return cast(int, getattr(projection, "out_features", getattr(projection, "nf", 0)))


def _width_in(projection: nn.Module) -> int:
    return cast(int, getattr(projection, "in_features", getattr(projection, "nx", 0)))
