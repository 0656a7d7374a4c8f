"""Whether a head's z is its pattern times its values: only then is what it moves a matrix."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from freeze_core.activations import LayerActivations, Recording
from freeze_core.attention.layout import AttentionSite
from freeze_core.circuits.linear import rounding, wide
from freeze_core.circuits.observing import drawn_tokens, undisturbed
from freeze_core.errors import InterventionError, UnsupportedModelError
from freeze_core.recording import record, under_eager

__all__ = ["not_moved", "recorded"]

TOKENS = 4
"""On which it is looked at."""


def recorded(model: nn.Module, layers: Sequence[int], attention: str) -> Recording:
    """What the attention of `layers` reads and writes on drawn tokens, patterns included.

    Raises:
        UnsupportedModelError: it forms no patterns, or what was asked for does not come by.
    """
    # Under eager throughout, since some families bias scores otherwise under other implementations.
    with undisturbed(model), under_eager(model):
        tokens = drawn_tokens(model, 1, TOKENS)
        try:
            return record(model, tokens, layers, pattern=True, attention=attention)
        except InterventionError as error:  # of tokens that are not the user's
            raise UnsupportedModelError(str(error)) from error


def not_moved(site: AttentionSite, head: int, seen: LayerActivations) -> str:
    """Why a head's z is not its pattern times its values, or nothing."""
    assert seen.pattern is not None
    z, values = wide(seen.z[..., head, :]), wide(seen.v[..., head // site.group, :])
    moved = wide(seen.pattern[..., head, :, :]) @ values
    if moved.shape == z.shape and bool(((moved - z).abs() <= rounding(seen.z.dtype) * values.abs().amax()).all()):
        return ""
    return (
        f"z of head {head} of {site.name} is not its pattern times its values (a gate on z, say, or a norm or clip of "
        "the values)"
    )
