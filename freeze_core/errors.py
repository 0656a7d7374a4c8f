"""What can go wrong. Every message names the value, what is allowed, and what to do."""

from __future__ import annotations

from typing import Any

from freeze_core.versions import newer_than_run

__all__ = [
    "CircuitFreezeError",
    "FreezeNotInForceError",
    "InterventionError",
    "StaleCacheWarning",
    "UnsupportedModelError",
    "shown",
    "with_newer_versions",
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


def with_newer_versions(message: str) -> str:
    """A message that ends with the libraries that are newer than those this version was run with, if some are.

    It is for errors that a change in a library can cause. Such messages are often made of other such messages, so
    the sentence is taken out of them first and stands at the end, once.
    """
    newer = newer_than_run()
    return f"{message.replace(f' ({newer})', '')} ({newer})" if newer else message


class CircuitFreezeError(ValueError):
    """Base of every error that this library raises on purpose.

    `frozen` is what the end of a `with` could not remove; call its `remove()` once the cause is undone.
    """

    frozen: Any = None


class UnsupportedModelError(CircuitFreezeError):
    """The model, or one of its attention layers, cannot be served; the message says why."""

    def __init__(self, message: str = "") -> None:
        super().__init__(with_newer_versions(message))


class InterventionError(CircuitFreezeError):
    """A config, a call or a forward pass cannot be served as asked."""


class FreezeNotInForceError(CircuitFreezeError):
    """An attention layer ran without its frozen activation: its result must not be trusted."""

    def __init__(self, message: str = "") -> None:
        super().__init__(with_newer_versions(message))


class StaleCacheWarning(UserWarning):
    """A cache that was filled before the freeze, or under another one, is used under a live freeze."""
