"""Where the ends of an interval lie among what is drawn anew, by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import stats


def expanded(drawn: Any, confidence: float, n: int) -> list[float]:
    """The two ends among the values of a statistic of `n` sequences drawn anew `[draw]`."""
    t = stats.t.ppf((1 + confidence) / 2, n - 1)
    beyond = float(stats.norm.cdf(-math.sqrt(n / (n - 1)) * t)) * (len(drawn) - 1)
    ordered = np.sort(drawn)
    return [float(ordered[math.floor(beyond)]), float(ordered[-1 - math.floor(beyond)])]
