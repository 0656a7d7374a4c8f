"""How sure a number is that was measured on some sequences: intervals by the bootstrap, and paired tests.

Sequences are what is drawn anew, whole ones, since tokens of one sequence are not independent: B. Efron and R. J.
Tibshirani, "An Introduction to the Bootstrap", 1993.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from freeze_core.errors import InterventionError, shown
from freeze_core.extras import extra

__all__ = ["Estimate", "Resampling"]


LARGEST = 2**22
"""Sequences that are drawn at once, over all resamples: 32 MiB a number."""

CHUNK = 64
"""Resamples of many numbers at once that are drawn together at least."""


class Estimate(NamedTuple):
    """A number and its interval."""

    value: float
    low: float
    high: float


class Resampling:
    """Draws sequences anew, the same ones for every number.

    Args:
        confidence: of intervals, in (0, 1).
        resamples: how many times they are drawn, and how many signs are for a test.

    Raises:
        InterventionError: one of them is not allowed.
        ImportError: scipy is not installed.
    """

    def __init__(self, confidence: float, resamples: int, resampling_seed: int) -> None:
        if isinstance(confidence, bool) or not isinstance(confidence, float) or not 0 < confidence < 1:
            raise InterventionError(f"confidence={shown(confidence)}: must be a number in (0, 1), as 0.95")
        for name, value, least in (("resamples", resamples, 100), ("resampling_seed", resampling_seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InterventionError(f"{name}={shown(value)}: must be an int of {least} at least")
        self.settings: dict[str, Any] = {
            "confidence": confidence,
            "resamples": resamples,
            "resampling_seed": resampling_seed,
        }
        self._stats = extra("scipy.stats", "intervals are made by scipy")

    def estimate(self, statistic: Callable[..., Any], *values: Tensor) -> Estimate:
        """`statistic(*values, axis)` of `values`, each `[sequence]`, with its percentile interval."""
        arrays = tuple(one.numpy() for one in values)
        low, high = self._interval(statistic, arrays)
        return Estimate(float(statistic(*arrays, axis=-1)), float(low), float(high))

    def mean_intervals(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The lower and the upper ends `[...]` of the intervals of the means of `values` `[..., sequence]`, all in one.

        nan where a value is.
        """
        rows = values.numpy().reshape(-1, values.shape[-1])
        ends = np.full((2, len(rows)), np.nan)
        real = np.flatnonzero(~np.isnan(rows).any(1))
        for some in np.array_split(real, -(-rows[real].size * CHUNK // LARGEST)) if len(real) else ():
            ends[:, some] = self._interval(np.mean, (rows[some],))
        low, high = torch.from_numpy(ends).view(2, *values.shape[:-1])
        return low, high

    def _interval(self, statistic: Callable[..., Any], arrays: tuple[Any, ...]) -> tuple[Any, Any]:
        with np.errstate(invalid="ignore"):  # of the standard error, which is not asked for, where a draw is infinite
            made = self._stats.bootstrap(
                arrays,
                statistic,
                paired=True,
                axis=-1,
                vectorized=True,
                n_resamples=self.settings["resamples"],
                batch=max(1, LARGEST // arrays[0].size),
                confidence_level=self.settings["confidence"],
                method="percentile",
                rng=self._generator(),
            )
        low, high = made.confidence_interval
        return low, high

    def paired_test(self, differences: Tensor) -> float:
        """The probability, were there no effect, of a mean of `differences` `[sequence]` this far from 0.

        Signs are drawn at random, or all tried where they are few: under no effect each is as likely as the other.
        """
        made = self._stats.permutation_test(
            (differences.numpy(),),
            np.mean,
            permutation_type="samples",
            vectorized=True,
            n_resamples=self.settings["resamples"],
            batch=max(1, LARGEST // len(differences)),
            rng=self._generator(),
        )
        return float(made.pvalue)

    def _generator(self) -> np.random.Generator:
        return np.random.default_rng(self.settings["resampling_seed"])

    def adjusted(self, probabilities: Sequence[float]) -> list[float]:
        """`probabilities` for that many tests at once, which may depend on each other in any way.

        The rate of false discoveries is held: Y. Benjamini and D. Yekutieli, "The control of the false discovery rate
        in multiple testing under dependency", 2001.
        """
        return [float(one) for one in self._stats.false_discovery_control(probabilities, method="by")]
