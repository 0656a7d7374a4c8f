"""Projections that give again what they gave for the same input: the passes that start at one layer share it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from freeze_core.generators import Generators

__all__ = ["ReuseOutput"]


class ReuseOutput:
    """Keeps a module's first input and output, and gives that output wherever the input is the same again.

    A freeze lies on top: what it replaces is computed anew in each pass, and what the projection gave is not written
    to. Should anything write to it all the same, the output is no longer used.
    """

    def __init__(self, generators: Generators) -> None:
        self._generators = generators
        self._input: Tensor | None = None
        self._output = torch.empty(0)
        self._version = 0

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        if x is not None and self._input is not None and self._output._version == self._version:
            return self._output if torch.equal(x, self._input) else forward(x)
        before = self._generators.states()
        output = forward(*args, **kwargs)
        if isinstance(x, Tensor) and isinstance(output, Tensor) and not self._generators.drew(before):
            self._input, self._output, self._version = x, output, output._version
        return output
