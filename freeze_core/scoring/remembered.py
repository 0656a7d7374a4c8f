"""Projections that give again what they gave for the same input: passes that start at one layer share it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from freeze_core.forward_patch import ForwardPatch
from freeze_core.generators import Generators

__all__ = ["remembering"]


class Remembered(ForwardPatch):
    """Stands in for the forward of a projection, beneath a freeze."""

    def __init__(self, module: nn.Module, generators: Generators) -> None:
        super().__init__(module)
        self._generators = generators
        self._input: Tensor | None = None
        self._output = torch.empty(0)
        self._version = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        if x is not None and self._input is not None and self._output._version == self._version:
            if torch.equal(x, self._input):
                return self._output
            return self.original(x)
        before = self._generators.states()
        output = self.original(*args, **kwargs)
        if isinstance(x, Tensor) and isinstance(output, Tensor) and not self._generators.drew(before):
            self._input, self._output, self._version = x, output, output._version
        return output


@contextmanager
def remembering(modules: Sequence[nn.Module], generators: Generators) -> Iterator[None]:
    """Has `modules` remember the first input that they are given, and what they made of it."""
    with ExitStack() as stack:
        for module in modules:
            one = Remembered(module, generators)
            one.attach()
            stack.callback(one.detach)
        yield
