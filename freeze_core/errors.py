"""What can go wrong. Every message names the value, what is allowed, and what to do."""

from __future__ import annotations

__all__ = [
    "CircuitFreezeError",
    "FreezeNotInForceError",
    "InterventionError",
    "StaleCacheWarning",
    "UnsupportedModelError",
]


class CircuitFreezeError(ValueError):
    """Base of every error that this library raises on purpose."""


class UnsupportedModelError(CircuitFreezeError):
    """The model, or one of its attention layers, cannot be served; the message says why."""


class InterventionError(CircuitFreezeError):
    """A config, a call or a forward pass cannot be served as asked."""


class FreezeNotInForceError(CircuitFreezeError):
    """An attention layer ran without its frozen activation: its result must not be trusted."""


class StaleCacheWarning(UserWarning):
    """A cache that was filled before the freeze, or under another one, is used under a live freeze."""
