"""Finds the modules of a model that attend, layer by layer, by what the tables and the names say, or by their look."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from freeze_core.attention.classes import is_recurrent
from freeze_core.attention.families import CONTINUED
from freeze_core.attention.probed import may_attend
from freeze_core.attention.storages import refusal, stores_projections
from freeze_core.errors import UnsupportedModelError

__all__ = ["SHARED", "Found", "attention_modules", "layer_count", "stack_of"]

CROSS = ("crossattention", "cross_attn", "encoder_attn", "EncDecAttention")
"""What decoder layers call the attention that reads an encoder's states, which is not self-attention."""

SHARED = "is_kv_shared_layer"
"""What is true of an attention module that reads the keys and values of an earlier layer."""


class Found(NamedTuple):
    """One attention module in a stack of layers; `known` is whether names or tables tell how it stores its heads."""

    stack: str
    layer: int
    kind: str
    name: str
    attention: nn.Module
    known: bool


def attention_modules(model: nn.Module, attention: str) -> list[Found]:
    """The attention modules of the kind that is asked for, in the one stack that is, each layer's in turn.

    Args:
        attention: `self`, `cross` or `encoder`.

    Raises:
        UnsupportedModelError: there are none, or in several stacks.
    """
    found = [one for one in _in_layers(model) if not _is_of_a_sense(model, one.stack)]
    if not found:
        raise UnsupportedModelError(_none(model))
    role = "encoder" if attention == "encoder" else "decoder"
    every, known_stacks = {one.stack for one in found}, {one.stack for one in found if one.known}
    inside = _inside(model, every, role)
    # Attention that only looks like it may be elsewhere, in what sees images or hears sounds; and so may what is known.
    stacks = known_stacks & inside or inside or known_stacks or every
    kind = "cross" if attention == "cross" else "self"
    unserved = {one.stack: refusal(one.attention) for one in found if one.stack in stacks}
    if len(stacks) > 1 and all(unserved.values()):
        raise UnsupportedModelError("; ".join(dict.fromkeys(filter(None, unserved.values()))))
    stack = stack_of(model, sorted(stacks), role)
    asked = [one for one in found if one.stack == stack and one.kind == kind]
    known = {one.layer for one in asked if one.known}
    return [one for one in asked if one.known or one.layer not in known]


def _is_of_a_sense(model: nn.Module, stack: str) -> bool:
    """Whether a stack in a model of words is in a part that is given images or sounds, by what both say themselves."""
    if getattr(model, "main_input_name", "") != "input_ids":
        return False
    parts = stack.split(".")
    around = (model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) - 1, 0, -1))
    return (
        next((part.main_input_name for part in around if hasattr(part, "main_input_name")), "input_ids") != "input_ids"
    )


def layer_count(model: nn.Module, stack: str) -> int:
    """The number of layers, attention or not, of a stack and of those that go on from it."""
    parts = [part for part, (first, _) in _continued(model).items() if first == stack]
    return sum(len(list(model.get_submodule(part).children())) for part in parts or [stack])


def _continued(model: nn.Module) -> dict[str, tuple[str, int]]:
    """For each stack that goes on from another, itself included: the first one, and the number of its first layer."""
    found: dict[str, tuple[str, int]] = {}
    for name, module in model.named_modules():
        parts = [f"{name}.{part}".lstrip(".") for part in CONTINUED.get(type(module).__name__, ())]
        start = 0
        for part in parts:
            found[part] = (parts[0], start)
            start += len(list(model.get_submodule(part).children()))
    return found


def _none(model: nn.Module) -> str:
    recurrent = sorted({type(module).__name__ for module in model.modules() if is_recurrent(module)})
    if recurrent:
        return (
            f"{type(model).__name__} has no attention: its layers mix tokens by a recurrence ({', '.join(recurrent)}), "
            "without a pattern of queries and keys"
        )
    return (
        f"{type(model).__name__} has no attention layer with projections to freeze: no layer of a ModuleList holds "
        "query, key and value projections under names that are known, or a module that is called attention"
    )


def _in_layers(model: nn.Module) -> Iterator[Found]:
    """Every attention module in a layer, a module that several layers share once for each."""
    lists: set[str] = set()
    known: list[str] = []
    continued = _continued(model)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, torch.jit.ScriptModule | nn.DataParallel):
            raise UnsupportedModelError(
                f"{name or 'the model'} is a {type(module).__name__}, which does not run the modules that a freeze "
                "replaces: freeze the model before it is scripted or replicated, without that wrapper"
            )
        if isinstance(module, nn.ModuleList):
            lists.add(name)
        is_known = _is_known(module)
        if is_known:
            known.append(f"{name}.")
        if is_known or (_may_be(module) and not name.startswith(tuple(known))):
            parts = name.split(".")
            kind = "cross" if set(CROSS) & set(parts) else "self"
            stacks = [".".join(parts[:depth]) for depth in range(1, len(parts))]
            outermost = next((stack for stack in stacks if stack in lists), None)
            if outermost is not None:
                stack, start = continued.get(outermost, (outermost, 0))
                layer = start + int(name[len(outermost) + 1 :].split(".")[0])
                yield Found(stack, layer, kind, name, module, is_known)


def _is_known(module: nn.Module) -> bool:
    if getattr(module, SHARED, False) or refusal(module):
        return True
    return stores_projections(module) and not is_recurrent(module)


def _may_be(module: nn.Module) -> bool:
    """Whether a module looks like attention, and holds nothing that is, or looks more like it."""
    if not may_attend(module) or is_recurrent(module):
        return False
    within = (part for part in module.modules() if part is not module)
    return not any(_is_known(part) or is_recurrent(part) or may_attend(part) for part in within)


def stack_of(model: nn.Module, stacks: list[str], role: str) -> str:
    """The list of layers that decodes, or encodes: the only one, or the outermost inside the model's own decoder."""
    if len(stacks) == 1 and role == "decoder":
        return stacks[0]
    depths = sorted((stack.count("."), stack) for stack in _inside(model, stacks, role))
    if not depths or [depth for depth, _ in depths].count(depths[0][0]) > 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} has attention in the stacks of layers {', '.join(stacks)}, and does not say which "
            f"is its {role}: pass the module that holds the one to freeze, such as the {role} itself"
        )
    return depths[0][1]


def _inside(model: nn.Module, stacks: Iterable[str], role: str) -> set[str]:
    """Those of `stacks` that are inside what the model says is its decoder, or its encoder."""
    modules = _part(model, role)
    other = _part(model, "encoder" if role == "decoder" else "decoder")
    if other < modules:  # what both call theirs belongs to the smaller of the two
        modules -= other
    return {stack for stack in stacks if model.get_submodule(stack) in modules}


def _part(model: nn.Module, role: str) -> set[nn.Module]:
    getter: Any = getattr(model, f"get_{role}", None)
    part = getter() if getter else None
    return set(part.modules()) if isinstance(part, nn.Module) and part is not model else set()
