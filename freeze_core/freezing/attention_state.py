"""Keys and values that attention keeps on itself between passes, where no argument hands them over.

Code that is written for study often does: an attribute is `None`, then the keys of the first pass, then those with the
keys of the next pass behind them. No mark can be put on them, and their tokens are not counted, so that a step would
be frozen as if its first token were the first of all. Such code is recognised by what it does: in a pass without a
cache something that it keeps becomes longer by the tokens of the pass. The pattern or the output of the last pass,
which research code often keeps as well, does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from freeze_core.freezing.caches import filled, is_cache

__all__ = ["StateWatch"]

LIBRARIES = ("freeze_core", "torch", "transformers")
"""Packages whose modules and objects keep no keys and values of earlier passes."""

OF_MODULES = frozenset(vars(nn.Module()))
"""Attributes that every module has."""

DEPTH = 5
"""How deep containers and objects are looked into."""


class StateWatch:
    """Watches what modules of one's own keep from pass to pass; modules of transformers and torch are left out.

    Args:
        stack: the stack of layers.
        paths: of the attentions in it whose modules, and the modules around them, are watched.
    """

    def __init__(self, stack: nn.Module, paths: Sequence[str]) -> None:
        self._modules: dict[str, nn.Module] = {}
        for path in paths:
            parts = path.split(".") if path else []
            around = {".".join(parts[:depth]): None for depth in range(len(parts))}
            inside = dict(stack.get_submodule(path).named_modules(prefix=path))
            for name, module in {**{name: stack.get_submodule(name) for name in around}, **inside}.items():
                if not _of_library(module):
                    self._modules[name] = module

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor that is kept, and the length of every cache, by its path."""
        return {
            name: size
            for path, module in self._modules.items()
            for attribute, value in (*vars(module).items(), *module._buffers.items())
            if attribute not in OF_MODULES
            for name, size in _sizes(value, f"{path}.{attribute}" if path else attribute, DEPTH)
        }

    def grown(self, before: Mapping[str, tuple[int, ...]], tokens: int) -> str:
        """The path of something that is longer by `tokens` than it was in `before`; empty where nothing is."""
        return next(
            (name for name, size in self.sizes().items() if name in before and _is_longer(before[name], size, tokens)),
            "",
        )


def _of_library(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] in LIBRARIES


def _sizes(value: Any, path: str, depth: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    if isinstance(value, Tensor):
        if value.dim() > 2 and value.dtype != torch.bool:
            yield path, tuple(value.shape)
    elif is_cache(value):
        yield path, (filled(value),)
    elif depth and not isinstance(value, str | nn.Module | type) and not _of_library(value):
        if isinstance(value, list | tuple):
            value = dict(enumerate(value))
        for name, part in (value if isinstance(value, Mapping) else getattr(value, "__dict__", {})).items():
            yield from _sizes(part, f"{path}.{name}", depth - 1)


def _is_longer(before: tuple[int, ...], after: tuple[int, ...], tokens: int) -> bool:
    """Whether one dimension, that of the rows left out, has grown by `tokens`, and all others are as they were."""
    if len(before) != len(after):
        return False
    grown = [(number, new - old) for number, (old, new) in enumerate(zip(before, after, strict=True)) if new != old]
    return len(grown) == 1 and grown[0][1] == tokens > 0 and (grown[0][0] > 0 or len(after) == 1)
