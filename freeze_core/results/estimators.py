"""What is estimated of sequences, as functions along any axis, so that sequences can be drawn anew."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["average", "effect_size", "mean", "perplexity", "ratio"]


def mean(totals: Any, targets: Any, axis: int) -> Any:
    """The mean over all targets of all sequences."""
    return totals.sum(axis) / targets.sum(axis)


def perplexity(losses: Any, targets: Any, axis: int) -> Any:
    """exp of the mean loss over all targets."""
    return np.exp(mean(losses, targets, axis))


def effect_size(changes: Any, axis: int) -> Any:
    """Cohen's d of paired samples (J. Cohen, "Statistical Power Analysis for the Behavioral Sciences", 1988, d_z).

    No change at all is 0; the same change of all sequences is infinite.
    """
    middle, spread = changes.mean(axis), changes.std(axis, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(middle == 0, 0.0, middle / spread)


def average(values: Any, axis: int) -> Any:
    """The mean over sequences."""
    return values.mean(axis)


def ratio(parts: Any, wholes: Any, axis: int) -> Any:
    """The mean of `parts` over that of `wholes`; infinite where that is 0, as it may be in a draw."""
    part, whole = parts.mean(axis), wholes.mean(axis)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(whole == 0, np.inf, part / whole)
