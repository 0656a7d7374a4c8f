"""Which tokens are padding, where the layers are told in another form than a padding mask.

A composite model (a language model with eyes, say) may make masks of its own of the padding mask that it is given, a
dict of one for each kind of layer, before its language model sees any.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from freeze_core.errors import InterventionError
from freeze_core.freezing.replaced import ReplacedForward

__all__ = ["Arguments", "Composite", "told"]


class Arguments:
    """Finds arguments of a forward by name, whether they are given by name or by position."""

    def __init__(self, forward: Any, *names: str) -> None:
        parameters = list(inspect.signature(forward).parameters)
        self._places = {name: parameters.index(name) for name in names if name in parameters}

    def find(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The argument called `name`, `None` where it is not given."""
        place = self._places.get(name, len(args))
        return args[place] if place < len(args) else kwargs.get(name)


class Composite(ReplacedForward):
    """Stands in for the forward of a module around a stack of layers: knows the mask that it was given, and its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._arguments = Arguments(self.original, "attention_mask")
        self._busy = threading.Lock()
        self.given: list[Any] = []
        """The mask of the pass that is running, if one is."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._run(args, kwargs)
        if not self._busy.acquire(blocking=False):
            raise InterventionError(
                f"a {type(self.module).__name__} whose layers are frozen is running already, in another thread: run a "
                "frozen model in one thread at a time"
            )
        try:
            return self._run(args, kwargs)
        finally:
            self._busy.release()

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.given = [self._arguments.find("attention_mask", args, kwargs)]
        try:
            return self.original(*args, **kwargs)
        finally:
            self.given = []


def told(own: Any, given: Sequence[Any]) -> Any:
    """The mask that tells padding: a stack's `own`, or where that does not, what the composite around was `given`."""
    return next((mask for mask in (own, *given) if _tells(mask)), own)


def _tells(mask: Any) -> bool:
    return mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
