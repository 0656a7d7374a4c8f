"""Vectors that are made of activations alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from freeze_core.errors import InterventionError

__all__ = ["CLOSED", "mean_difference", "principal_component"]


def mean_difference(positive: Tensor, negative: Tensor) -> Tensor:
    """The mean of `positive` less that of `negative` `[prompt, hidden]`, `[hidden]`.

    Contrastive activation addition: N. Rimsky et al., "Steering Llama 2 via Contrastive Activation Addition", 2024;
    of one pair, A. M. Turner et al., "Activation Addition: Steering Language Models Without Optimization", 2023.
    """
    return positive.mean(0) - negative.mean(0)


def principal_component(positive: Tensor, negative: Tensor) -> Tensor:
    """The direction in which paired differences are largest, in mean square, as long as their mean reaches along it.

    The differences `d` are not centred: their mean is what all pairs have in common, and to take it away would leave
    only how pairs differ from each other. (A. Zou et al., "Representation Engineering: A Top-Down Approach to AI
    Transparency", 2023, draw the sign of each difference, after which the mean is 0 and centring changes nothing: `d`
    and `-d` have the same second moment.) With `u` that direction, of length 1, the result is `u (u . mean(d))`: its
    sign is the one that puts positive prompts on the positive side, and strength 1 moves a stream by as much along `u`
    as pairs lie apart.

    Args:
        positive, negative: of pairs, `[pair, hidden]`.

    Raises:
        InterventionError: pairs do not lie apart along that direction, on average.
    """
    differences = positive - negative
    direction = torch.linalg.svd(differences, full_matrices=False).Vh[0]
    along = direction @ differences.mean(0)
    rounding = torch.finfo(differences.dtype).eps * len(differences) * differences.norm()
    if bool(along.abs() <= rounding):
        raise InterventionError(
            "method='principal_component': pairs differ most in a direction in which, on average, they do not lie "
            "apart, so that it has no positive side: use method='mean_difference', or other pairs"
        )
    scaled: Tensor = direction * along
    return scaled


CLOSED: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean_difference": mean_difference,
    "principal_component": principal_component,
}
"""The methods that need no further pass."""
