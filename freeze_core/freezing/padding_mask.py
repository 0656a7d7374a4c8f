"""Which tokens are padding, where the layers are told in another form than a padding mask.

A composite model (a language model with eyes, say) may make masks of its own of the padding mask that it is given, a
dict of one for each kind of layer, before its language model sees any. CPM-Ant's layers are handed no mask at all, and
prompts of its own before the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from freeze_core.forward_patch import PassPatch
from freeze_core.freezing.pass_arguments import ForwardArguments

__all__ = ["Composite", "UnknownMask", "given_masks", "prompt_of", "select_padding_mask"]


@dataclass(frozen=True)
class UnknownMask:
    """Stands for the padding mask where a module takes none by the name of `attention_mask`, and may pad all the same.

    Args:
        reason: what may be padding, in words.
    """

    reason: str


class Composite(PassPatch):
    """Stands in for the forward of a module around a stack of layers: knows the mask that it was given, and its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._arguments = ForwardArguments(module, self.original)
        self.masks: list[Any] = []
        """What it was given as masks of the pass that is running, if one is."""

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.masks = given_masks(self._arguments, self._arguments.bind(args, kwargs))
        try:
            return self.original(*args, **kwargs)
        finally:
            self.masks = []


def given_masks(arguments: ForwardArguments, named: Mapping[str, Any]) -> list[Any]:
    """The `attention_mask` of a call as a list of one, `None` by default; an empty list where there is no padding mask.

    What is called otherwise and may say which tokens are padding stands as an `UnknownMask`: a tensor of rows by
    tokens, or whole numbers of which each row has one, its length maybe.
    """
    if arguments.takes("attention_mask") or "attention_mask" in named:
        return [named.get("attention_mask")]
    if not named:
        return []
    values = dict(_tensors_in(named))
    tensors = {name: value for name, value in values.items() if value.dim() > 1}
    if not tensors:
        return []
    tokens = next((tensors[name] for name in ("input_ids", "inputs_embeds") if name in tensors), None)
    if tokens is None:
        tokens = tensors[next(iter(tensors))]  # what a model is given first, whatever it calls it
    rows, count = tokens.shape[:2]
    for name, value in values.items():
        if value is tokens or any(part in name for part in NO_MASK):
            continue
        if value.dim() > 1 and (value.shape[0], value.shape[-1]) in ((rows, count), (count, rows)):
            return [UnknownMask(f"{name} {list(value.shape)} may say which tokens are padding")]
        if value.shape == (rows,) and not value.is_floating_point() and not any(part in name for part in NO_LENGTH):
            return [UnknownMask(f"{name} {list(value.shape)} may say how many tokens of each row are not padding")]
    return []


def _tensors_in(named: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors among the arguments of a call, and in dicts among them. A list of whole numbers stands as one."""
    for name, value in named.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, list | tuple) and value and all(type(one) is int for one in value):
            yield name, torch.tensor(value)
        elif isinstance(value, Mapping):
            yield from ((f"{name}[{key!r}]", one) for key, one in _tensors_in(value))


NO_MASK = ("embed", "hidden", "ids", "label", "position", "state")
"""Parts of the names of other tensors of rows by tokens."""

NO_LENGTH = ("_id", "class", "index", "lang", "step", "target", "task", "time", "type")
"""Parts of the names of other whole numbers of which each row has one."""


def prompt_of(stack: nn.Module) -> int:
    """How many tokens of its own a stack of layers puts before those that it is given, as CPM-Ant calls it."""
    prompt: int = getattr(stack, "prompt_length", 0)
    return prompt


def select_padding_mask(masks: Sequence[Any], prompt_length: int) -> Any:
    """The first of the `masks` given to a stack and to the module around it that says which tokens are padding.

    The `prompt_length` tokens that a stack puts before its input are not padding.
    """
    mask = masks[0] if masks else None
    if not _is_padding_mask(mask):
        mask = next((other for other in masks if _is_padding_mask(other)), mask)
    return F.pad(mask, (prompt_length, 0), value=1) if prompt_length and isinstance(mask, Tensor) else mask


def _is_padding_mask(mask: Any) -> bool:
    return mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
