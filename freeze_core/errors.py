"""What can go wrong. Every message names the value, what is allowed, and what to do."""

from __future__ import annotations

from typing import Any

__all__ = [
    "CircuitFreezeError",
    "FreezeNotInForceError",
    "InterventionError",
    "StaleCacheWarning",
    "UnsupportedModelError",
    "shown",
]

LONGEST = 300
"""Characters of a value that a message shows."""


def shown(value: object) -> str:
    """A value as messages show it: its repr, cut where it is long, or its type where it has none."""
    try:
        text = repr(value)
    except Exception:  # an int of thousands of digits, an object whose repr raises
        return f"<{type(value).__name__}>"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


class CircuitFreezeError(ValueError):
    """Base of every error that this library raises on purpose.

    `frozen` is what the end of a `with` could not remove; call its `remove()` once the cause is undone.
    """

    frozen: Any = None


class UnsupportedModelError(CircuitFreezeError):
    """The model, or one of its attention layers, cannot be served; the message says why."""


class InterventionError(CircuitFreezeError):
    """A config, a call or a forward pass cannot be served as asked."""


class FreezeNotInForceError(CircuitFreezeError):
    """An attention layer ran without its frozen activation: its result must not be trusted."""


class StaleCacheWarning(UserWarning):
    """A cache that was filled before the freeze, or under another one, is used under a live freeze."""
