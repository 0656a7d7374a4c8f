"""Finds, in any model, each attention layer that can be frozen, and says why where one cannot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from freeze_core.attention.classes import parameters_of, runs_library_code
from freeze_core.attention.layout import AttentionSite, Layout, Sites
from freeze_core.attention.modules import SHARED, Found, attention_modules, layer_count
from freeze_core.attention.probed import ProbeFailedError, is_covered, probed_layouts, was_probed
from freeze_core.attention.storages import layout_of, reading_parts, refusal, stores_projections
from freeze_core.errors import CircuitFreezeError, UnsupportedModelError
from freeze_core.forward_patch import patches_on
from freeze_core.ordinary import ordinary_tensors
from freeze_core.vocabulary import ModelArchitecture

__all__ = ["find_sites"]

STORES, KIND = "store_full_length_kv", "layer_type"
"""What is true of an attention module that stores its keys and values for later layers; what tells which they read."""


@ordinary_tensors()
def find_sites(model: nn.Module, architecture: ModelArchitecture | None = None, attention: str = "self") -> Sites:
    """The attention layers of `model`.

    Args:
        model: a Hugging Face model, or any module that holds one.
        architecture: how q, k and v are stored, stated by hand: it vouches for attention classes that are not
            known, and is checked against what the model has.
        attention: `self` and `cross` of the decoder, or of the only stack of layers; `encoder` is the encoder's own.

    Raises:
        UnsupportedModelError: no such attention, or none that can be served, with the reason.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"model is a {type(model).__name__}: must be a torch.nn.Module")
    try:
        return _find_sites(model, architecture, attention)
    except (CircuitFreezeError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever an attribute of a kind that no known release has leads to
        raise UnsupportedModelError(
            f"{type(model).__name__}: looking for its attention raised {type(error).__name__}: {error}"
        ) from error


def _find_sites(model: nn.Module, architecture: ModelArchitecture | None, attention: str) -> Sites:
    asked = attention_modules(model, attention)
    by_layer, refused = _sites(asked, architecture, _probed(model, asked))
    if not by_layer:
        reasons = _reasons(asked, refused)
        raise UnsupportedModelError(reasons or f"attention={attention!r}: {type(model).__name__} has no such attention")
    stack = asked[0].stack
    name = _entered(model, stack.rpartition(".")[0])
    names = {one.layer: one.name for one in asked}
    stacked = model.get_submodule(name)
    around = _encoder_decoder(model, name) if attention == "encoder" else None
    layers, composite = layer_count(model, stack), _composite(model, name)
    return Sites(model, layers, stacked, name, composite, by_layer, names, refused, around)


def _entered(model: nn.Module, name: str) -> str:
    """The path of the innermost module around `name` that is given tokens: some holders see hidden states only."""
    return next(_given_tokens(model, name), name)


def _given_tokens(model: nn.Module, name: str) -> Iterator[str]:
    """The paths of the modules around `name` that are given tokens, itself and from the inside out."""
    parts = name.split(".") if name else []
    for depth in range(len(parts), -1, -1):
        outer = ".".join(parts[:depth])
        if "input_ids" in parameters_of(model.get_submodule(outer)):
            yield outer


def _composite(model: nn.Module, name: str) -> nn.Module | None:
    """The next module around the stack `name` that is given its tokens, where that may be told of padding otherwise.

    That is where the two are of different configs, or where the stack is handed no mask.
    """
    stack = model.get_submodule(name)
    around = (model.get_submodule(outer) for outer in _given_tokens(model, name) if outer != name)
    outer = next(around, None)
    if outer is None:
        return None
    if getattr(outer, "config", None) is getattr(stack, "config", None) and "attention_mask" in parameters_of(stack):
        return None
    parameters = parameters_of(outer)
    # Of an encoder and a decoder the mask is the encoder's.
    return outer if "attention_mask" in parameters and "decoder_input_ids" not in parameters else None


def _encoder_decoder(model: nn.Module, name: str) -> tuple[nn.Module, nn.Module] | None:
    """The innermost module around the encoder `name` that takes `encoder_outputs`, and what computes them inside it."""
    parts = name.split(".") if name else []
    for depth in range(len(parts) - 1, -1, -1):
        outer = model.get_submodule(".".join(parts[:depth]))
        if "encoder_outputs" in parameters_of(outer):
            return outer, outer.get_submodule(parts[depth])
    return None


def _reasons(found: list[Found], refused: Mapping[int, str]) -> str:
    """Why all of these layers are refused: layers of one reason are told by the first of them."""
    names: dict[str, list[str]] = {}
    for one in found:
        name, _, reason = refused[one.layer].partition(": ")
        if name == one.name:
            names.setdefault(reason, []).append(name)
    return "; ".join(
        f"{first}{f' (and {len(rest)} more like it)' if rest else ''}: {reason}"
        for reason, (first, *rest) in names.items()
    )


def _sites(
    found: list[Found],
    architecture: ModelArchitecture | None,
    probed: Mapping[nn.Module, Layout | UnsupportedModelError],
) -> tuple[dict[int, AttentionSite], dict[int, str]]:
    """The sites among the attention modules of one kind in one stack, and why others are none."""
    by_layer: dict[int, AttentionSite] = {}
    refused: dict[int, str] = {}
    names: dict[int, str] = {}
    for one in found:
        try:
            if one.layer in names:
                raise UnsupportedModelError(
                    f"the layer has another attention, {names[one.layer]}, and a layer index does not say which"
                )
            by_layer[one.layer] = _site(one, architecture, probed)
            names[one.layer] = one.name
        except UnsupportedModelError as error:
            by_layer.pop(one.layer, None)
            refused[one.layer] = f"{one.name}: {error}"
    readers = [one.attention for one in found if getattr(one.attention, SHARED, False)]
    by_layer = {layer: _with_readers(site, readers) for layer, site in by_layer.items()}
    _refuse_shared(by_layer, refused, found)
    return by_layer, refused


def _with_readers(site: AttentionSite, readers: Sequence[nn.Module]) -> AttentionSite:
    """The site, whose keys and values are unshared along with later layers that read them, or not at all."""
    unshared = site.layout.unshared
    if unshared is None or not readers or not getattr(site.attention, STORES, True):
        return site
    own = tuple(one for one in readers if getattr(one, KIND, None) == getattr(site.attention, KIND, None))
    # One that has projections of its own reads those where there is no cache.
    known = hasattr(site.attention, STORES) and not any(stores_projections(one) for one in own)
    known = known and all(hasattr(one, name) for one in own for name in unshared.attributes)
    return replace(site, layout=replace(site.layout, unshared=replace(unshared, readers=own) if known else None))


def _probed(model: nn.Module, found: list[Found]) -> Mapping[nn.Module, Layout | UnsupportedModelError]:
    """What probing shows of the attention modules whose code is not transformers' own; most models have none."""
    hints: dict[nn.Module, Layout | str] = {}
    checked: dict[type, bool] = {}
    for one in found:
        attention = one.attention
        if _live(attention) is not None or getattr(attention, SHARED, False) or refusal(attention):
            continue
        if not one.known:
            hints[attention] = ""
        elif not all(runs_library_code(part, checked) for part in reading_parts(attention)):
            if is_covered(attention) and not was_probed(attention):
                continue  # frozen as the tables say, before something was put on top
            try:
                hints[attention] = layout_of(attention, None)
            except UnsupportedModelError as error:
                hints[attention] = str(error)
    return probed_layouts(model, list(hints), hints) if hints else {}


def _live(attention: nn.Module) -> AttentionSite | None:
    """The site of an attention module that is frozen: its attributes may be those of the unshared storage."""
    held = (getattr(patch, "site", None) for patch in patches_on(attention))
    return next((site for site in held if isinstance(site, AttentionSite)), None)


def _site(
    found: Found, architecture: ModelArchitecture | None, probed: Mapping[nn.Module, Layout | UnsupportedModelError]
) -> AttentionSite:
    live, layout = _live(found.attention), probed.get(found.attention)
    if getattr(found.attention, SHARED, False):
        raise UnsupportedModelError("its keys and values are an earlier layer's")
    if isinstance(layout, UnsupportedModelError):
        if architecture is None or not found.known or not isinstance(layout, ProbeFailedError):
            raise layout
        layout = None  # nothing contradicts what was stated
    known = live.layout if live else layout
    if known and architecture not in (None, known.architecture):
        raise UnsupportedModelError(
            f"architecture={str(architecture)!r} is contradicted by the layer, which is {known.architecture}"
        )
    if live:  # maybe found elsewhere now: another model may hold the same layer in another place
        return replace(live, layer=found.layer, kind=found.kind, name=found.name)
    layout = layout or layout_of(found.attention, architecture)
    return AttentionSite(found.layer, found.kind, found.name, found.attention, layout)


def _refuse_shared(by_layer: dict[int, AttentionSite], refused: dict[int, str], found: list[Found]) -> None:
    """Refuses layers whose attention, or one of whose projections, serves elsewhere too: both would be frozen."""
    uses: dict[nn.Module, list[str]] = {}
    for one in found:
        uses.setdefault(one.attention, []).append(f"layer {one.layer}")
    for layer, site in by_layer.items():
        for role, module in (*site.layout.shared.modules.items(), ("output", site.layout.output)):
            uses.setdefault(module, []).append(f"{role} of layer {layer}")
    for layer, site in list(by_layer.items()):
        for module in (site.attention, site.layout.output, *site.layout.shared.modules.values()):
            if len(uses[module]) > 1:
                refused[layer] = (
                    f"{site.name}: one {type(module).__name__} serves {' and '.join(uses[module])}, and cannot be "
                    "frozen for one of them"
                )
                by_layer.pop(layer, None)
