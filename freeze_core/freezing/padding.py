"""Which tokens are padding, where the layers are told in another form than a padding mask.

A composite model (a language model with eyes, say) may make masks of its own of the padding mask that it is given, a
dict of one for each kind of layer, before its language model sees any. CPM-Ant's layers are handed no mask at all, and
prompts of its own before the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from freeze_core.freezing.replaced import ReplacedPass
from freeze_core.freezing.signatures import signature_of

__all__ = ["Arguments", "Composite", "prompt_of", "told"]


class Arguments:
    """Finds arguments of a forward by their `names`, whether they are given by name or by position."""

    def __init__(self, forward: Any, *names: str) -> None:
        parameters = list(signature_of(forward).parameters)
        self._places = {name: parameters.index(name) for name in names if name in parameters}

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """What is given, by name: what was given by name, and of the rest what is looked for."""
        if not args:
            return kwargs
        placed = {name: args[place] for name, place in self._places.items() if place < len(args)}
        return {**kwargs, **placed}

    def given(self, name: str, named: Mapping[str, Any]) -> list[Any]:
        """The argument called `name` as a list of one, `None` by default; none where there is no such argument."""
        return [named.get(name)] if name in self._places else []


class Composite(ReplacedPass):
    """Stands in for the forward of a module around a stack of layers: knows the mask that it was given, and its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._arguments = Arguments(self.original, "attention_mask")
        self.given: list[Any] = []
        """The mask of the pass that is running, if one is."""

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.given = [self._arguments.named(args, kwargs).get("attention_mask")]
        try:
            return self.original(*args, **kwargs)
        finally:
            self.given = []


def prompt_of(stack: nn.Module) -> int:
    """How many tokens of its own a stack of layers puts before those that it is given, as CPM-Ant calls it."""
    prompt: int = getattr(stack, "prompt_length", 0)
    return prompt


def told(given: Sequence[Any], prompt: int) -> Any:
    """The mask that tells padding: the first of those `given`, to a stack and what is around it, that does.

    What a stack puts before the tokens by itself, `prompt` tokens, is no padding.
    """
    mask = given[0] if given else None
    if not _tells(mask):
        mask = next((other for other in given if _tells(other)), mask)
    return F.pad(mask, (prompt, 0), value=1) if prompt and isinstance(mask, Tensor) else mask


def _tells(mask: Any) -> bool:
    return mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
