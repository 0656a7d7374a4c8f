"""Where the ends of an interval lie among what is drawn anew, by hand."""

from __future__ import annotations

import math

from scipy import stats


def expanded(confidence: float, n: int) -> list[float]:
    """The two quantiles of the statistic of `n` sequences drawn anew."""
    t = stats.t.ppf((1 + confidence) / 2, n - 1)
    upper = float(stats.norm.cdf(math.sqrt(n / (n - 1)) * t))
    return [1 - upper, upper]
