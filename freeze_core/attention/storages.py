"""How an attention layer holds its q, k, v and z, worked out from its modules and the data in `families`."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from freeze_core.attention.classes import names_of
from freeze_core.attention.families import (
    FUSED,
    GATED_QUERY,
    HARMLESS,
    LATENT,
    NORMS,
    SEPARATE,
    UNSEPARABLE,
    FusedStorage,
    SeparateStorage,
)
from freeze_core.attention.layout import Layout, Part, Storage, fused_layout, plain_layout, widened
from freeze_core.errors import UnsupportedModelError
from freeze_core.vocabulary import ModelArchitecture, Role

__all__ = [
    "layout_of",
    "reading_parts",
    "refusal",
    "stores_projections",
    "unshared_projections",
    "width_in",
    "width_of",
]


def stores_projections(attention: nn.Module) -> bool:
    """Whether a module looks like attention with projections that can be frozen."""
    return bool(attention._modules and (_fused(attention) or _separate(attention) or _is_latent(attention)))


def reading_parts(attention: nn.Module) -> list[nn.Module]:
    """The attention module and those parts of it that do more than project: their code says whose a feature is."""
    core = _core(attention, _separate(attention))
    parts = [part for module in {attention, core} for name, part in module._modules.items() if name not in _PROJECTIONS]
    return [attention, core, *(part for part in parts if part is not None)]


def refusal(attention: nn.Module) -> str | None:
    """Why attention of this class cannot be served, if it cannot."""
    known = (cls for cls in names_of(attention) if cls in UNSEPARABLE)
    return next((f"{type(attention).__name__} cannot be served: {UNSEPARABLE[name]}" for name in known), None)


def layout_of(attention: nn.Module, architecture: ModelArchitecture | None) -> Layout:
    """The layout of an attention module that `stores_projections`.

    Raises:
        UnsupportedModelError: with the reason.
    """
    reason = refusal(attention)
    if reason:
        raise UnsupportedModelError(reason)
    fused, separate = _fused(attention), _separate(attention)
    stored = ModelArchitecture.FUSED_QKV if fused else ModelArchitecture.SEPARATE_QKV
    if architecture not in (None, stored):
        raise UnsupportedModelError(
            f"architecture={str(architecture)!r} is contradicted by {type(attention).__name__}, which is {stored}"
        )
    if fused:
        return _fused_layout(attention, fused)
    if architecture is None:
        _refuse_unknown_parts(_core(attention, separate), separate)
    if separate:
        return _separate_layout(attention, separate)
    return _latent_layout(attention)


_PROJECTIONS = {
    *(path.rpartition(".")[2] for entry in SEPARATE for path in (*entry[:3], *entry.outputs)),
    *(name for entry in FUSED.values() for name in (entry.projection, entry.output)),
    *(*LATENT.queries, LATENT.unpacked, LATENT.compressed, LATENT.output),
}
"""Names of linear layers, whose own class (quantised, adapted) is no reason to doubt which head reads a feature."""


def _children(module: nn.Module) -> dict[str, nn.Module]:
    return dict(module.named_children())


def _fused(attention: nn.Module) -> FusedStorage | None:
    entries = (FUSED[name] for name in names_of(attention) if name in FUSED)
    return next((entry for entry in entries if entry.projection in _children(attention)), None)


def _separate(attention: nn.Module) -> SeparateStorage | None:
    # A module may be false: one that torch compiled has a length, which it asks of what it wraps.
    return next((names for names in SEPARATE if all(_part(attention, path) is not None for path in names[:3])), None)


def _part(attention: nn.Module, path: str) -> nn.Module | None:
    """The submodule at `path`, if the module has one."""
    found: Any = attention
    for name in path.split("."):
        found = found._modules.get(name) if isinstance(found, nn.Module) else None
    return cast("nn.Module | None", found)


def _core(attention: nn.Module, separate: SeparateStorage | None) -> nn.Module:
    """The module that holds the projections themselves."""
    return attention.get_submodule(separate.q.rpartition(".")[0]) if separate else attention


def _is_latent(attention: nn.Module) -> bool:
    children = _children(attention).keys()
    return {LATENT.unpacked, LATENT.compressed, LATENT.output} <= children and not children.isdisjoint(LATENT.queries)


def _fused_layout(attention: nn.Module, entry: FusedStorage) -> Layout:
    name, module, output = entry.projection, _children(attention)[entry.projection], _children(attention)[entry.output]
    heads, kv_heads = entry.heads(attention), entry.kv_heads(attention)
    head_dim = width_in(output) // heads
    width, expected = width_of(module), (heads + 2 * kv_heads) * head_dim
    _refuse_unknown_width(entry.output, output, width_in(output))
    _refuse_unknown_width(name, module, width)
    if width != expected:
        raise UnsupportedModelError(
            f"{name} gives {width} features, but {heads} query and {kv_heads} KV heads of {head_dim} features make "
            f"{expected}"
        )
    index = fused_layout(heads, kv_heads, head_dim, entry.blocks(attention), entry.order)
    modules = {name: _behind_norms(attention, name, module, width, head_dim)}
    shared = Storage(modules, {name: width}, {role: (Part(name, one),) for role, one in index.items()})
    unshared = None
    if kv_heads < heads and entry.unshared:
        wide = fused_layout(heads, heads, head_dim, entry.unshared_blocks(attention), entry.order)
        unshared = Storage(
            modules,
            {name: 3 * heads * head_dim},
            {role: (Part(name, one),) for role, one in wide.items()},
            {name: widened(index, wide)},
            entry.unshared(attention),
        )
    return Layout(ModelArchitecture.FUSED_QKV, heads, kv_heads, head_dim, output, attention, shared, unshared)


def _separate_layout(attention: nn.Module, names: SeparateStorage) -> Layout:
    core = _core(attention, names)
    projections = {name: attention.get_submodule(name) for name in names[:3]}
    output = next((part for part in (_part(attention, path) for path in names.outputs) if part is not None), None)
    if output is None:
        raise UnsupportedModelError(f"no output projection: it has none of {', '.join(names.outputs)}")
    gated = any(cls.__name__ in GATED_QUERY for cls in type(attention).__mro__)
    widths = {name: width_of(module) for name, module in projections.items()}
    for name, module in {**projections, "the output projection": output}.items():
        _refuse_unknown_width(name, module, width_in(module) if module is output else widths[name])
    head_dim = _head_dim(core)
    heads, kv_heads = widths[names.q] // head_dim // (2 if gated else 1), widths[names.k] // head_dim
    value_dim = widths[names.v] // max(kv_heads, 1)
    plain = heads and kv_heads and heads % kv_heads == 0
    if not plain or kv_heads * head_dim != widths[names.k] or kv_heads * value_dim != widths[names.v]:
        raise UnsupportedModelError(
            f"projections of {widths} features in heads of {head_dim}: neither multi-head nor grouped-query attention"
        )
    if width_in(output) != heads * value_dim:
        raise UnsupportedModelError(
            f"{names.q} holds {heads} heads, whose values make {heads * value_dim} features, but the output projection "
            f"takes {width_in(output)}: {names.q} holds more than queries (an output gate, say)"
        )
    modules = {
        name: _behind_norms(core, role, module, widths[name], head_dim)
        for role, (name, module) in zip(("q", "k", "v"), projections.items(), strict=True)
    }
    q_index = plain_layout(heads, (2 if gated else 1) * head_dim)[:, :head_dim]
    k_index, v_index = plain_layout(kv_heads, head_dim), plain_layout(kv_heads, value_dim)
    q, k, v = Part(names.q, q_index), Part(names.k, k_index), Part(names.v, v_index)
    shared = Storage(modules, widths, {"q": (q,), "k": (k,), "v": (v,)})
    unshared = unshared_projections(core, shared, heads)
    return Layout(ModelArchitecture.SEPARATE_QKV, heads, kv_heads, head_dim, output, core, shared, unshared)


def unshared_projections(core: nn.Module, shared: Storage, heads: int) -> Storage | None:
    """`shared` projections, each of one role, with one KV head for each query head, where the module can read them."""
    k, v = shared.features["k"][0], shared.features["v"][0]
    kv_heads = len(k.features)
    # The module's own code repeats each KV head this many times: repeat them before it does.
    if kv_heads == heads or getattr(core, "num_key_value_groups", None) != heads // kv_heads:
        return None
    wide = {part.module: plain_layout(heads, part.features.shape[1]) for part in (k, v)}
    attributes = {"num_key_value_groups": 1}
    if hasattr(core, "num_key_value_heads"):
        attributes["num_key_value_heads"] = heads
    return Storage(
        shared.modules,
        {**shared.widths, **{name: index.numel() for name, index in wide.items()}},
        {
            "q": shared.features["q"],
            "k": (Part(k.module, wide[k.module]),),
            "v": (Part(v.module, wide[v.module]),),
        },
        {part.module: widened({"k": part.features}, {"k": wide[part.module]}) for part in (k, v)},
        attributes,
    )


def _latent_layout(attention: nn.Module) -> Layout:
    children = _children(attention)
    query = next(name for name in LATENT.queries if name in children)
    facts: Any = attention
    heads, rotary, plain, value = (
        facts.num_heads,
        facts.qk_rope_head_dim,
        facts.qk_nope_head_dim,
        facts.v_head_dim,
    )
    names = (query, LATENT.unpacked, LATENT.compressed)
    widths = {name: width_of(children[name]) for name in names}
    per_query = widths[query] // heads
    q_index = plain_layout(heads, per_query)[:, : plain + rotary]
    unpacked = plain_layout(heads, plain + value)
    shared_rotary = plain_layout(1, widths[LATENT.compressed])[:, -rotary:]
    features: dict[Role, tuple[Part, ...]] = {
        "q": (Part(query, q_index),),
        "k": (Part(LATENT.unpacked, unpacked[:, :plain]), Part(LATENT.compressed, shared_rotary)),
        "v": (Part(LATENT.unpacked, unpacked[:, plain:]),),
    }
    shared = Storage({name: children[name] for name in names}, widths, features)
    output = children[LATENT.output]
    return Layout(ModelArchitecture.SEPARATE_QKV, heads, heads, plain + rotary, output, attention, shared)


def _behind_norms(attention: nn.Module, role: str, projection: nn.Module, width: int, head_dim: int) -> nn.Module:
    """The projection, or the norm behind it where that spans all heads: before it heads are not separate."""
    for name in NORMS.get(cast(Role, role), ()):
        norm = getattr(attention, name, None)
        weight = getattr(norm, "weight", None)
        if isinstance(weight, Tensor) and weight.numel() == width != head_dim and weight.dim() == 1:
            return cast(nn.Module, norm)
    return projection


def _refuse_unknown_parts(attention: nn.Module, separate: SeparateStorage | None) -> None:
    known = {*HARMLESS, *(name for names in NORMS.values() for name in names)}
    if separate:
        known |= {path.rpartition(".")[2] for path in (*separate[:3], *separate.outputs)}
    else:
        known |= {*LATENT.queries, LATENT.unpacked, LATENT.compressed, LATENT.output}
        known |= {"q_a_proj", "q_a_layernorm", "kv_a_layernorm"}
    unknown = [name for name, _ in attention.named_children() if name not in known]
    unknown += [name for name, _ in attention.named_parameters(recurse=False) if name not in known]
    if unknown:
        raise UnsupportedModelError(
            f"it is not known what {', '.join(unknown)} of {type(attention).__name__} does between the projections and "
            "the attention; if q_proj, k_proj and v_proj are what attention reads, say so with "
            "architecture='separate_qkv'"
        )


def _head_dim(attention: nn.Module) -> int:
    for name in ("head_dim", "head_size", "attention_head_size", "dim_head", "key_value_proj_dim"):
        value = getattr(attention, name, None)
        if isinstance(value, int) and value > 0:
            return value
    raise UnsupportedModelError(
        f"{type(attention).__name__} has no attribute head_dim: it does not say how large a head is"
    )


def width_of(projection: nn.Module) -> int:
    """Features that a linear layer gives: `out_features`, `nf` of transformers' Conv1D, or those of what it wraps."""
    for name in ("out_features", "nf"):
        if hasattr(projection, name):
            return cast(int, getattr(projection, name))
    return next(filter(None, map(width_of, reversed(_wrapped(projection)))), 0)


def width_in(module: nn.Module) -> int:
    """Features that a linear layer, or a norm, takes."""
    for name in ("in_features", "nx"):
        if hasattr(module, name):
            return cast(int, getattr(module, name))
    inner = next(filter(None, map(width_in, _wrapped(module))), 0)
    weight = getattr(module, "weight", None)
    return inner or (weight.numel() if isinstance(weight, Tensor) else 0)


def _wrapped(module: nn.Module) -> list[nn.Module]:
    """What a module runs one after the other, where that is known: a `Sequential`, or something around one module."""
    inner = getattr(module, "linear", None)
    if isinstance(inner, nn.Module):
        return [inner]
    children = list(module.children())
    return children if isinstance(module, nn.Sequential) or len(children) == 1 else []


def _refuse_unknown_width(name: str, module: nn.Module, width: int) -> None:
    if not width:
        raise UnsupportedModelError(
            f"{name} is a {type(module).__name__}, which does not say how many features it takes and gives: freeze the "
            "model before this is put around the projection, or give it the attributes in_features and out_features"
        )
