"""Which tokens are padding, where the layers are told in another form than a padding mask.

A composite model (a language model with eyes, say) may make masks of its own of the padding mask that it is given, a
dict of one for each kind of layer, before its language model sees any. CPM-Ant's layers are handed no mask at all, and
prompts of its own before the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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

    A tensor of rows by tokens that is called otherwise may be a padding mask, and stands as an `UnknownMask`.
    """
    if arguments.takes("attention_mask") or "attention_mask" in named:
        return [named.get("attention_mask")]
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor) and value.dim() > 1}
    if not tensors:
        return []
    tokens = next((tensors[name] for name in ("input_ids", "inputs_embeds") if name in tensors), None)
    if tokens is None:
        tokens = tensors.pop(next(iter(tensors)))  # what a model is given first, whatever it calls it
    for name, value in tensors.items():
        by_rows = value is not tokens and value.shape[0] == tokens.shape[0] and value.shape[-1] == tokens.shape[1]
        if by_rows and not any(part in name for part in NO_MASK):
            return [UnknownMask(f"{name} {list(value.shape)} may say which tokens are padding")]
    return []


NO_MASK = ("embed", "hidden", "ids", "label", "position", "state")
"""Parts of the names of other tensors of rows by tokens."""


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
