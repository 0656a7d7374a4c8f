"""Effects against strength, with their intervals."""

from __future__ import annotations

from typing import Any

import numpy as np

from freeze_core.errors import InterventionError, shown
from freeze_core.plots.style import array, check_text, figure, lines
from freeze_core.vectors.effects import SteeringEffects

__all__ = ["plot_effect_by_strength", "plot_vector_effect"]

COLUMNS = ("strength", "effect", "effect_low", "effect_high", "n")


def plot_effect_by_strength(table: Any, *, unit: str, title: str = "", label: str = "circuit") -> Any:
    """The effect of a freeze against its strength, a line for each circuit, with a band for the interval.

    Args:
        table: a frame, or a mapping of columns: `strength`, `effect`, `effect_low`, `effect_high`, `n`, and, where
            there are several lines, a column that tells them apart.
        unit: of the effect, with what it is: the label of its axis.
        title: of the figure.
        label: the name of that column.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        InterventionError: a column that is missing, or columns that do not fit.
        ImportError: matplotlib is not installed.
    """
    return _curves(table, label, unit, title, "strength of the freeze (0: unfrozen, 1: replaced)")


def plot_vector_effect(table: Any, *, unit: str, title: str = "", label: str = "vector") -> Any:
    """The effect of an intervention vector against its strength, beside that of random vectors of its length.

    Args:
        table: what `InterventionVector.evaluate` returned, or `InterventionVector.effects`; or columns, as in
            `plot_effect_by_strength`, of which `label` tells vector from controls.
        unit, title, label: as in `plot_effect_by_strength`.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        InterventionError: a column that is missing, or columns that do not fit.
        ImportError: matplotlib is not installed.
    """
    columns = _columns_of(table, label) if isinstance(table, SteeringEffects) else table
    return _curves(columns, label, unit, title, "strength of the vector (0: none added)")


def _columns_of(effects: SteeringEffects, label: str) -> dict[str, list[Any]]:
    """The changes that a vector makes, then those that random ones make in the mean."""
    names = {"change": "found", "control": f"random, mean of {effects.controls.shape[1]}"}
    columns: dict[str, list[Any]] = {name: [] for name in (*COLUMNS, label)}
    for measure, name in names.items():
        for row in effects.rows:
            cells = (row.strength, *getattr(row, measure), len(effects.clean), name)
            for column, cell in zip(columns.values(), cells, strict=True):
                column.append(cell)
    return columns


def _curves(table: Any, label: str, unit: str, title: str, across: str) -> Any:
    check_text("unit", unit)
    columns = {name: array(name, _column(table, name), 1) for name in COLUMNS}
    count = len(columns["strength"])
    if any(len(one) != count for one in columns.values()):
        raise InterventionError(
            f"columns of {', '.join(f'{len(one)} {name}' for name, one in columns.items())}: must fit"
        )
    labels = [str(one) for one in _column(table, label)] if label in table else [""] * count
    if len(labels) != count:
        raise InterventionError(f"{label} has {len(labels)} rows, the other columns {count}")
    made = figure(6.4, 4.2)
    axis = made.subplots()
    axis.axhline(0, color="0.5", linewidth=0.8)
    for name, line in lines(list(dict.fromkeys(labels))).items():
        rows = np.flatnonzero([one == name for one in labels])
        rows = rows[np.argsort(columns["strength"][rows], kind="stable")]
        strength, effect, low, high, n = (columns[column][rows] for column in COLUMNS)
        axis.fill_between(strength, low, high, color=line.color, alpha=0.18, linewidth=0)
        axis.plot(strength, effect, label=f"{name} ({_counted(n)})".lstrip(), markersize=5, **line._asdict())
        for end in (low, high):  # bands that lie on each other are told apart by their edges
            axis.plot(strength, end, color=line.color, linestyle=line.linestyle, linewidth=0.6)
    axis.set_xlabel(across)
    axis.set_ylabel(unit)
    axis.legend(title="band: interval")
    if title:
        axis.set_title(title, wrap=True)
    return made


def _column(table: Any, name: str) -> Any:
    if not hasattr(table, "keys") or name not in table:
        raise InterventionError(f"table has no column {name}: must have {', '.join(COLUMNS)}: {shown(table)}")
    return list(table[name])


def _counted(n: Any) -> str:
    low, high = int(n.min()), int(n.max())
    return f"n = {low}" if low == high else f"n = {low} to {high}"
