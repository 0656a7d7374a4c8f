"""A head's attention pattern before and after a freeze."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from freeze_core.activations import Recording
from freeze_core.errors import InterventionError, shown
from freeze_core.plots.heatmap import draw_heatmaps
from freeze_core.plots.style import array

__all__ = ["plot_patterns"]


def plot_patterns(
    before: Recording | Tensor,
    after: Recording | Tensor,
    tokens: Sequence[Any] | None = None,
    *,
    layer: int | None = None,
    head: int | None = None,
    row: int = 0,
    keys: Sequence[Any] | None = None,
) -> Any:
    """Where a head looks before and after a freeze, side by side, a query a line.

    Args:
        before, after: what `record(..., pattern=True)` gave without and under the freeze, or patterns `[token, key]`.
        tokens: labels of the queries, and of the keys if they are as many.
        layer, head: of recordings, whose pattern.
        row: of recordings, of which prompt.
        keys: labels of the keys, where they are other tokens.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        InterventionError: there is no such pattern, or labels do not fit.
        ImportError: matplotlib is not installed.
    """
    panels = {}
    for name, given in (("before", before), ("after", after)):
        panels[name] = array(name, _pattern(name, given, layer, head, row), 2)
    shape = panels["before"].shape
    columns = keys if keys is not None else tokens if shape[0] == shape[1] else None
    whose = "" if layer is None or head is None else f"layer {layer}, head {head}: "
    return draw_heatmaps(
        panels,
        unit="attention (share of a query's)",
        n="n = 1 prompt",
        title=f"{whose}pattern before and after the freeze",
        row="query token",
        column="key token",
        rows=tokens,
        columns=columns,
        share=True,
    )


def _pattern(name: str, given: object, layer: int | None, head: int | None, row: int) -> object:
    if not isinstance(given, Recording):
        return given
    if layer is None or layer not in given or head is None:
        raise InterventionError(
            f"layer={shown(layer)}, head={shown(head)}: must be given with a recording, a layer of {list(given)}"
        )
    pattern = given[layer].pattern
    if pattern is None:
        raise InterventionError(f"{name} has no patterns: record with pattern=True")
    try:
        return pattern[row, head]
    except (IndexError, TypeError) as error:
        raise InterventionError(
            f"row={shown(row)}, head={shown(head)}: not in a pattern {list(pattern.shape)}"
        ) from error
