"""How well projections on a vector tell positive prompts from negative ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from freeze_core.extras import extra
from freeze_core.results.intervals import Estimate, Resampling

__all__ = ["Separation", "Stability", "projections", "separation", "split_cosines", "stability"]


class Separation(NamedTuple):
    """Of held-out prompts, with intervals over prompts.

    Args:
        auc: the probability that a positive prompt projects further than a negative one, ties counted half; 0.5 is
            chance.
        accuracy: the mean of the two shares, 0 to 1, of positive prompts above and negative ones below the middle of
            the two means of the prompts that the vector was found on.
    """

    auc: Estimate
    accuracy: Estimate


class Stability(NamedTuple):
    """The cosine of the vectors of two halves of the prompts that were found on, over random halves.

    Args:
        value: its mean.
        low, high: between which the middle share of the halves is (no interval of the mean).
        splits: how many times they were halved.
    """

    value: float
    low: float
    high: float
    splits: int


def projections(activations: Tensor, vector: Tensor) -> Tensor:
    """Of `[prompt, hidden]` in the direction of `vector`, `[prompt]` in the stream's unit."""
    exact = vector.double()
    along: Tensor = activations @ (exact / exact.norm())
    return along


def separation(
    positive: Tensor, negative: Tensor, threshold: float, paired: bool, resampling: Resampling
) -> Separation:
    """Of projections `[prompt]`; pairs are drawn anew together, other prompts each kind by itself."""
    stats = extra("scipy.stats", "intervals are made by scipy")

    def auc(upper: Any, lower: Any, axis: int) -> Any:
        # The rank sum of H. B. Mann and D. R. Whitney, "On a test of whether one of two random variables is
        # stochastically larger than the other", 1947.
        m, n = upper.shape[axis], lower.shape[axis]
        ranks = stats.rankdata(np.concatenate([upper, lower], axis), axis=axis)
        return (ranks[..., :m].sum(axis) - m * (m + 1) / 2) / (m * n)

    def accuracy(upper: Any, lower: Any, axis: int) -> Any:
        return ((upper > threshold).mean(axis) + (lower < threshold).mean(axis)) / 2

    return Separation(
        resampling.estimate(auc, positive, negative, paired=paired),
        resampling.estimate(accuracy, positive, negative, paired=paired),
    )


def split_cosines(
    sizes: tuple[int, int], paired: bool, find: Callable[[int, Tensor, Tensor], Tensor], seed: int, splits: int
) -> Tensor:
    """The cosine of the vectors of two random halves, `[split]`.

    Args:
        sizes: positive and negative prompts.
        paired: pairs stay together.
        find: the vector of some, given which half they are, 1 or 2, and their places among the positive and among the
            negative prompts.
    """
    generator = torch.Generator().manual_seed(seed)
    cosines = []
    for _ in range(splits):
        positive = torch.randperm(sizes[0], generator=generator)
        negative = positive if paired else torch.randperm(sizes[1], generator=generator)
        halves = zip(
            *([one.sort().values for one in rows.tensor_split(2)] for rows in (positive, negative)), strict=True
        )
        first, second = (find(number, *half).double() for number, half in enumerate(halves, 1))
        cosines.append(torch.nn.functional.cosine_similarity(first, second, dim=0))
    return torch.stack(cosines)


def stability(cosines: Tensor, confidence: float) -> Stability:
    """Of cosines `[split]`."""
    rest = (1 - confidence) / 2
    low, high = torch.quantile(cosines, torch.tensor([rest, 1 - rest], dtype=cosines.dtype)).tolist()
    return Stability(float(cosines.mean()), low, high, len(cosines))
