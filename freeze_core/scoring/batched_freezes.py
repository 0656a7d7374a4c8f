"""How many freezes of one layer go through the later layers together, as rows of one pass.

A layer that is given few tokens costs what reading its weights costs, for one freeze as for several. Only the frozen
layer is run under the freeze, on the batch's own rows; the later ones run on as many copies of the batch as there are
freezes, each copy continuing from what the frozen layer gave under one of them.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["TOKENS", "group_freezes", "worth_trying"]

TOKENS = 256
"""Of all rows of a pass together, at most: from about so many on a further token costs as much as the one before."""

LEAST = 3
"""Fewer freezes are run one by one: two save little, and finding out whether rows are independent takes three."""


def group_freezes(freezes: int, most: int) -> list[range]:
    """The indices of the freezes that run together, at most `most`: as few groups, and as even, as can be."""
    count = -(-freezes // most) if most >= LEAST else freezes
    return [range(freezes * one // count, freezes * (one + 1) // count) for one in range(count)]


def worth_trying(freezes: Mapping[int, int], most: int, layers: int) -> bool:
    """Whether groups save twice the layers that finding out whether rows are independent runs.

    Args:
        freezes: how many each layer has.
        most: how many run together.
        layers: how many the model has.
    """
    later = {layer: layers - 1 - layer for layer in freezes}
    saved = sum((count - len(group_freezes(count, most))) * later[layer] for layer, count in freezes.items())
    return saved > 2 * LEAST * max(later.values())
