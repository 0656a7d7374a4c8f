"""Signatures of forwards, looked up once: freezes are put in and taken out by the thousand."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

__all__ = ["signature_of"]

_KNOWN: WeakKeyDictionary[Callable[..., Any], inspect.Signature] = WeakKeyDictionary()
"""Of bound methods, by their functions: the methods themselves would keep their modules alive."""


def signature_of(forward: Callable[..., Any]) -> inspect.Signature:
    """The signature of a forward as it is called, without the module that it is bound to."""
    function = getattr(forward, "__func__", None)
    if not isinstance(function, FunctionType):
        return inspect.signature(forward)
    if function not in _KNOWN:
        _KNOWN[function] = inspect.signature(forward)
    return _KNOWN[function]
