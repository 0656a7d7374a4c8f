"""Heatmaps side by side on one scale: layers by heads, layers by positions, queries by keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from freeze_core.errors import InterventionError, shown
from freeze_core.plots.style import array, check_text, count_of, figure, share_map, signed_map, thinned

__all__ = ["draw_heatmaps", "plot_heatmap"]

Labels = Sequence[Any]

LETTER = 0.17
"""Inches that a line of tick labels is high."""


def plot_heatmap(
    values: Tensor | Mapping[str, Tensor],
    *,
    unit: str,
    n: int | str,
    title: str = "",
    row: str = "layer",
    column: str = "head",
    rows: Labels | None = None,
    columns: Labels | None = None,
) -> Any:
    """A heatmap of any scores, or several side by side on one scale; nan is hatched.

    Where a value is negative the scale is symmetric about 0.

    Args:
        values: `[row, column]`, as the effects of patching layer by position; or several by name, all of one shape.
        unit: of the values, with what they are: the label of the colour bar.
        n: over how many prompts each is a mean, or a text that says so.
        title: of the whole figure.
        row, column: what the axes are.
        rows, columns: labels in the place of numbers, such as tokens.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        InterventionError: values or labels that do not fit.
        ImportError: matplotlib is not installed.

    Example:
        >>> plot_heatmap(effects, unit="logit difference", n=32, column="position")  # doctest: +SKIP
    """
    panels = values if isinstance(values, Mapping) else {"": values}
    if not panels:
        raise InterventionError("values is empty: give at least one heatmap")
    arrays = {name: array(f"values {name}".rstrip(), one, 2) for name, one in panels.items()}
    return draw_heatmaps(arrays, unit=unit, n=n, title=title, row=row, column=column, rows=rows, columns=columns)


def draw_heatmaps(
    panels: Mapping[str, Any],
    *,
    unit: str,
    n: int | str,
    title: str,
    row: str,
    column: str,
    rows: Labels | None = None,
    columns: Labels | None = None,
    marked: Mapping[str, Any] | None = None,
    share: bool = False,
) -> Any:
    """See `plot_heatmap`; `panels` are arrays; cells that are `marked` get a dot; a `share` is from 0 to 1."""
    for name, text in (("unit", unit), ("row", row), ("column", column)):
        check_text(name, text)
    shapes = {one.shape for one in panels.values()}
    if len(shapes) > 1:
        raise InterventionError(f"heatmaps of shapes {', '.join(map(str, sorted(shapes)))}: must all be of one shape")
    (height, width) = shapes.pop()
    for name, labels, count in (("rows", rows, height), ("columns", columns, width)):
        if labels is not None and len(labels) != count:
            raise InterventionError(f"{name} are {len(labels)} labels, for {count} of the values: {shown(labels)}")
    across, down = (min(9.0, max(2.6, 0.2 * width)), min(9.0, max(2.2, 0.2 * height)))
    beside = 1.0 if rows is not None else 0.0
    below = 0.8 if columns is not None else 0.0
    made = figure(len(panels) * (across + 0.4) + 1.6 + beside, down + 1.2 + below)
    axes = made.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    low, high = _range(list(panels.values()), share)
    colours = share_map() if low >= 0 else signed_map()
    for (name, one), axis in zip(panels.items(), axes, strict=True):
        image = axis.imshow(np.ma.masked_invalid(one), cmap=colours, vmin=low, vmax=high, aspect="auto")
        axis.patch.set(facecolor="white", edgecolor="0.6", hatch="////")
        axis.set_title(name)
        axis.set_xlabel(column)
        _tick(axis.xaxis, columns, width, across)
        if marked is not None:
            _mark(axis, marked[name] & np.isfinite(one))
    axes[0].set_ylabel(row)
    _tick(axes[0].yaxis, rows, height, down)
    made.colorbar(image, ax=list(axes), label=f"{unit}\n{count_of(n)}", aspect=30)
    if title:
        made.suptitle(title, wrap=True)
    return made


def _range(values: list[Any], share: bool) -> tuple[float, float]:
    """The ends of the scale: symmetric about 0 where something is negative."""
    if share:
        return 0.0, 1.0
    finite = np.concatenate([one[np.isfinite(one)] for one in values])
    largest = float(np.abs(finite).max()) if len(finite) else 0.0
    largest = largest or 1.0
    return (-largest if (finite < 0).any() else 0.0), largest


def _tick(axis: Any, labels: Labels | None, count: int, room: float) -> None:
    """Labels as many ticks as there is room for."""
    horizontal = axis.axis_name == "x"
    if labels is None:
        each = (0.1 * len(str(count)) + 0.06) if horizontal else LETTER
        shown_ticks = thinned(count, room, each)
        axis.set_ticks(list(shown_ticks), [str(one) for one in shown_ticks])
        return
    shown_ticks = thinned(count, room, LETTER)
    axis.set_ticks(list(shown_ticks), [_plain(labels[one]) for one in shown_ticks])
    axis.set_tick_params(labelsize=8, rotation=90 if horizontal else 0)


def _plain(label: Any) -> str:
    """A label as it stands: a dollar would begin a formula, and blanks are seen."""
    text = str(label).replace("\n", "\u23ce").replace(" ", "\u00b7")
    return (text if len(text) <= 14 else f"{text[:13]}\u2026").replace("$", r"\$")


def _mark(axis: Any, cells: Any) -> None:
    """Puts a dot on each of `cells`, black and white, since it lies on any colour."""
    at = np.argwhere(cells)
    axis.scatter(at[:, 1], at[:, 0], s=9, c="white", edgecolors="black", linewidths=0.6)
