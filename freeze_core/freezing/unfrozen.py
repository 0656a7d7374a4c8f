"""Models that must be unfrozen: what a study calls clean is the model without a freeze."""

from __future__ import annotations

from torch import nn

from freeze_core.attention.layout import Sites
from freeze_core.attention.sites import find_sites
from freeze_core.errors import InterventionError
from freeze_core.freezing.install import is_frozen

__all__ = ["refuse_frozen", "unfrozen_sites"]


def refuse_frozen(model: nn.Module) -> None:
    """Raises `InterventionError` for a model that has a freeze, or a vector added to it."""
    if is_frozen(model):
        raise InterventionError("model is frozen: remove its freezes first, so that clean runs are its own")


def unfrozen_sites(model: nn.Module, attention: str = "self") -> Sites:
    """The attention layers of a model that is not frozen.

    Raises:
        UnsupportedModelError: the model is not supported.
        InterventionError: it is frozen.
    """
    sites = find_sites(model, attention=attention)
    refuse_frozen(model)
    return sites
