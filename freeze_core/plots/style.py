"""What all figures have in common: how they are made, colours that order in grey, lines that differ without colour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from freeze_core.arguments import is_int, refuse
from freeze_core.errors import InterventionError, shown
from freeze_core.extras import extra

__all__ = ["Line", "array", "check_text", "count_of", "figure", "lines", "share_map", "signed_map", "thinned"]

SIGNED = ("#08204a", "#2f5f9e", "#8f8f8f", "#eda555", "#fff3d6")
"""From negative over 0 to positive: each is lighter than the one before it, in grey too."""

SHARE = ("#ffffff", "#bcd3ea", "#6f9fd0", "#2f5f9e", "#08204a")
"""From 0 on, white to dark."""

# M. Okabe and K. Ito, "Color Universal Design", 2008, darker first.
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P")


class Line(NamedTuple):
    """How one of several lines is drawn."""

    color: str
    linestyle: Any
    marker: str


def figure(width: float, height: float) -> Any:
    """An empty figure of `width` by `height` inches, whose parts make room for each other.

    Raises:
        ImportError: matplotlib is not installed.
    """
    library = extra("matplotlib.figure", "plots are made by matplotlib; every result has its numbers without it")
    return library.Figure(figsize=(width, height), layout="constrained")


def lines(labels: Sequence[Any]) -> dict[Any, Line]:
    """A line for each label.

    Raises:
        InterventionError: more of them than can be told apart.
    """
    if len(labels) > len(COLOURS):
        raise InterventionError(f"{len(labels)} lines: must be {len(COLOURS)} at most, to be told apart without colour")
    return {label: Line(*one) for label, one in zip(labels, zip(COLOURS, DASHES, MARKERS, strict=True), strict=False)}


def signed_map() -> Any:
    """The colour map of what has a sign, for a scale that is symmetric about 0."""
    return _map("signed", SIGNED)


def share_map() -> Any:
    """The colour map of shares, 0 to 1, and of what else has no sign."""
    return _map("share", SHARE)


def _map(name: str, colours: Sequence[str]) -> Any:
    return extra("matplotlib.colors", "plots are made by matplotlib").LinearSegmentedColormap.from_list(name, colours)


def array(name: str, values: object, dimensions: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Values as float64, whatever holds them.

    Raises:
        InterventionError: they are no numbers, none at all, or of other dimensions.
    """
    try:
        found = np.asarray(values.detach().cpu().double() if isinstance(values, Tensor) else values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InterventionError(f"{name}={shown(values)}: must be numbers: {error}") from error
    if found.ndim != dimensions or not found.size:
        raise InterventionError(f"{name} is {list(found.shape)}: must be of {dimensions} dimensions, none of size 0")
    return found


def check_text(name: str, value: object) -> None:
    """Raises `InterventionError` for what is no text, or an empty one."""
    if not isinstance(value, str) or not value:
        refuse(name, value, "a text, as a figure says what its numbers are")


def count_of(n: object) -> str:
    """How many of what there were, as a figure says it: an int is of rows.

    Raises:
        InterventionError: it is no such number.
    """
    if isinstance(n, str) and n:
        return n
    if not is_int(n) or n < 0:
        refuse("n", n, "an int, over how many the numbers are means, or a text")
    return f"n = {n}"


def thinned(count: int, room: float, each: float) -> range:
    """Which of `count` ticks are labelled where each label takes `each` inches of `room`."""
    if count * each <= room:
        return range(count)
    least = max(1, int(np.ceil(count * each / room)))
    steps = sorted(base * 10**power for power in range(5) for base in (1, 2, 5))
    return range(0, count, next(step for step in steps if step >= least))
