"""What the class of a module says of it, worked out once a class: a model has many modules of few classes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from torch import nn

from freeze_core.attention.families import NOT_SOFTMAX

__all__ = ["is_called_attention", "is_recurrent", "names_of", "parameters_of"]

_once = lru_cache(maxsize=1024)  # classes that are made as a program runs are not held for ever


def names_of(module: nn.Module) -> tuple[str, ...]:
    """What the tables may call a module: its classes, by their name alone and with their module's."""
    return _names(type(module).__mro__)


def is_recurrent(module: nn.Module) -> bool:
    """Whether a module is one of those that mix tokens without a pattern."""
    return _is_recurrent(type(module).__mro__)


def is_called_attention(module: nn.Module) -> bool:
    """Whether one of a module's classes has attention in its name."""
    return _is_called_attention(type(module).__mro__)


def parameters_of(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """What the module's `forward` takes."""
    return _parameters(type(module).forward)


@_once
def _names(classes: tuple[type, ...]) -> tuple[str, ...]:
    called = ((one.__name__, f"{one.__module__.rpartition('.')[2]}.{one.__name__}") for one in classes)
    return tuple(name for pair in called for name in pair)


@_once
def _is_recurrent(classes: tuple[type, ...]) -> bool:
    return any(one.__name__ in NOT_SOFTMAX for one in classes)


@_once
def _is_called_attention(classes: tuple[type, ...]) -> bool:
    names = [one.__name__.lower() for one in classes]
    return any("attention" in name or "attn" in name for name in names)


@_once
def _parameters(forward: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(forward).parameters
