"""Finds, in any model, each attention layer that can be frozen, and says why where one cannot."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from freeze_core.attention.families import NOT_SOFTMAX
from freeze_core.attention.storages import Layout, layout_of, stores_projections
from freeze_core.errors import UnsupportedModelError
from freeze_core.freezing.replaced import standing_in
from freeze_core.vocabulary import ModelArchitecture

__all__ = ["AttentionSite", "Sites", "find_sites"]

CROSS = ("crossattention", "cross_attn", "encoder_attn", "EncDecAttention")
"""What decoder layers call the attention that reads an encoder's states, which is not self-attention."""

SHARED = "is_kv_shared_layer"
"""What is true of an attention module that reads the keys and values of an earlier layer."""


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """One attention layer: where it is, whether `self` or `cross`, and how it stores what its heads read and write."""

    layer: int
    kind: str
    name: str
    attention: nn.Module
    layout: Layout

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.layout.heads

    @property
    def kv_heads(self) -> int:
        """KV heads."""
        return self.layout.kv_heads

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True, eq=False)
class Sites:
    """The attention layers of one model.

    Args:
        layers: number of decoder layers, attention or not; indices count these.
        stack: the module around the decoder layers that sees each pass's tokens, mask and cache.
        stack_name: its path in the model.
        composite: the module that runs the stack as a part of itself and may make other masks of a padding mask first.
        by_layer: the attention layers that can be served.
        names: the paths of their attention modules in the model.
        refused: why others cannot, by layer. A layer in neither has no attention.
    """

    layers: int
    stack: nn.Module
    stack_name: str
    composite: nn.Module | None
    by_layer: Mapping[int, AttentionSite]
    names: Mapping[int, str]
    refused: Mapping[int, str]

    def path(self, site: AttentionSite) -> str:
        """The path of a site's attention module within the stack, whichever module the model was entered by."""
        prefix = f"{self.stack_name}." if self.stack_name else ""
        return self.names[site.layer].removeprefix(prefix)


class _Found(NamedTuple):
    stack: str
    layer: int
    kind: str
    name: str
    attention: nn.Module


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
    found = list(_attention_modules(model))
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no attention layer with projections to freeze: no layer of a ModuleList holds "
            "query, key and value projections under names that are known"
        )
    stack = _stack(model, sorted({one.stack for one in found}), "encoder" if attention == "encoder" else "decoder")
    kind = "cross" if attention == "cross" else "self"
    asked = [one for one in found if one.stack == stack and one.kind == kind]
    by_layer, refused = _sites(asked, architecture)
    if not by_layer:
        reasons = "; ".join(dict.fromkeys(refused.values()))
        raise UnsupportedModelError(reasons or f"attention={attention!r}: {type(model).__name__} has no such attention")
    name = _entered(model, stack.rpartition(".")[0])
    layers = len(list(model.get_submodule(stack).children()))
    names = {one.layer: one.name for one in asked}
    return Sites(layers, model.get_submodule(name), name, _composite(model, name), by_layer, names, refused)


def _entered(model: nn.Module, name: str) -> str:
    """The path of the innermost module around `name` that is given tokens: some holders see hidden states only."""
    return next(_given_tokens(model, name), name)


def _given_tokens(model: nn.Module, name: str) -> Iterator[str]:
    """The paths of the modules around `name` that are given tokens, itself and from the inside out."""
    parts = name.split(".") if name else []
    for depth in range(len(parts), -1, -1):
        outer = ".".join(parts[:depth])
        if "input_ids" in _parameters(model.get_submodule(outer)):
            yield outer


def _parameters(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(module).forward).parameters


def _composite(model: nn.Module, name: str) -> nn.Module | None:
    """The next module around the stack `name` that is given its tokens, where the two are of different configs."""
    stack = model.get_submodule(name)
    around = (model.get_submodule(outer) for outer in _given_tokens(model, name) if outer != name)
    outer = next(around, None)
    if outer is None or getattr(outer, "config", None) is getattr(stack, "config", None):
        return None
    parameters = _parameters(outer)
    # Of an encoder and a decoder the mask is the encoder's.
    return outer if "attention_mask" in parameters and "decoder_input_ids" not in parameters else None


def _sites(
    found: list[_Found], architecture: ModelArchitecture | None
) -> tuple[dict[int, AttentionSite], dict[int, str]]:
    """The sites among the attention modules of one kind in one stack, and why others are none."""
    by_layer: dict[int, AttentionSite] = {}
    refused: dict[int, str] = {}
    for one in found:
        try:
            if one.layer in by_layer:
                raise UnsupportedModelError(f"the layer has another attention, {by_layer[one.layer].name}")
            by_layer[one.layer] = _site(one, architecture)
        except UnsupportedModelError as error:
            by_layer.pop(one.layer, None)
            refused[one.layer] = f"{one.name}: {error}"
    if any(getattr(one.attention, SHARED, False) for one in found):
        # The layers that read another's keys and values would read them unshared.
        by_layer = {
            layer: replace(site, layout=replace(site.layout, unshared=None)) for layer, site in by_layer.items()
        }
    _refuse_shared(by_layer, refused, found)
    return by_layer, refused


def _attention_modules(model: nn.Module) -> Iterator[_Found]:
    """Every attention module in a layer, a module that several layers share once for each."""
    lists: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, torch.jit.ScriptModule | nn.DataParallel):
            raise UnsupportedModelError(
                f"{name or 'the model'} is a {type(module).__name__}, which does not run the modules that a freeze "
                "replaces: freeze the model before it is scripted or replicated, without that wrapper"
            )
        if isinstance(module, nn.ModuleList):
            lists.add(name)
        if _can_attend(module):
            parts = name.split(".")
            kind = "cross" if set(CROSS) & set(parts) else "self"
            stacks = [".".join(parts[:depth]) for depth in range(1, len(parts))]
            outermost = next((stack for stack in stacks if stack in lists), None)
            if outermost is not None:
                yield _Found(outermost, int(name[len(outermost) + 1 :].split(".")[0]), kind, name, module)


def _can_attend(module: nn.Module) -> bool:
    recurrent = any(cls.__name__ in NOT_SOFTMAX for cls in type(module).__mro__)
    return getattr(module, SHARED, False) or (stores_projections(module) and not recurrent)


def _stack(model: nn.Module, stacks: list[str], role: str) -> str:
    """The list of layers that decodes, or encodes: the only one, or the outermost inside the model's own decoder."""
    if len(stacks) == 1 and role == "decoder":
        return stacks[0]
    getter: Any = getattr(model, f"get_{role}", None)
    part = getter() if getter else None
    inside = set(part.modules()) if isinstance(part, nn.Module) and part is not model else set()
    depths = sorted((stack.count("."), stack) for stack in stacks if model.get_submodule(stack) in inside)
    if not depths or [depth for depth, _ in depths].count(depths[0][0]) > 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} has attention in the stacks of layers {', '.join(stacks)}, and does not say which "
            f"is its {role}: pass the module that holds the one to freeze, such as the {role} itself"
        )
    return depths[0][1]


def _site(found: _Found, architecture: ModelArchitecture | None) -> AttentionSite:
    live = getattr(standing_in(found.attention), "site", None)
    if isinstance(live, AttentionSite):  # frozen already: its attributes may be those of the unshared storage
        if architecture not in (None, live.layout.architecture):
            raise UnsupportedModelError(
                f"architecture={str(architecture)!r} is contradicted by the layer, which is {live.layout.architecture}"
            )
        return live
    if getattr(found.attention, SHARED, False):
        raise UnsupportedModelError("its keys and values are an earlier layer's")
    layout = layout_of(found.attention, architecture)
    return AttentionSite(found.layer, found.kind, found.name, found.attention, layout)


def _refuse_shared(by_layer: dict[int, AttentionSite], refused: dict[int, str], found: list[_Found]) -> None:
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
