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


def plot_vector_effect(table: Any, *, unit: str | None = None, title: str = "", label: str = "vector") -> Any:
    """The effect of an intervention vector against its strength, beside that of random vectors of its length.

    Args:
        table: the `SteeringEffects` of a vector, or the frame of them or of the vector; or columns as in
            `plot_effect_by_strength`, of which the column `label` tells vector from controls.
        unit: of the effect, as there; of the first two, `None` is the metric's.
        title, label: as there.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        InterventionError: a column that is missing, or columns that do not fit.
        ImportError: matplotlib is not installed.
    """
    if isinstance(table, SteeringEffects):
        rows = table.records()
        table = {name: [row[name] for row in rows] for name in rows[0]}
    if (
        hasattr(table, "keys")
        and "effect" not in table
        and {"change", "control", "metric", "unit"} <= set(table.keys())
    ):
        unit = f"change of {_one(table, 'metric')} ({_one(table, 'unit')})" if unit is None else unit
        table = _beside_controls(table, label)
    return _curves(table, label, unit, title, "strength of the vector (0: none added)")


def _one(table: Any, name: str) -> Any:
    """What a column has in all rows."""
    found = list(dict.fromkeys(table[name]))
    if len(found) != 1:
        raise InterventionError(f"{name} of table is {shown(found)}: must be one of all rows, as one axis has one unit")
    return found[0]


def _beside_controls(table: Any, label: str) -> dict[str, list[Any]]:
    """Of columns with both in each row, columns with the one below the other."""
    made: dict[str, list[Any]] = {name: 2 * _column(table, name) for name in ("strength", "n")}
    half = len(made["n"]) // 2
    made[label] = half * ["vector"] + half * ["random vectors"]
    for end in ("", "_low", "_high"):
        made[f"effect{end}"] = [*_column(table, f"change{end}"), *_column(table, f"control{end}")]
    return made


def _curves(table: Any, label: str, unit: str | None, title: str, across: str) -> Any:
    check_text("unit", unit)
    columns = {name: array(name, _column(table, name), 1) for name in COLUMNS}
    count = len(columns["strength"])
    if any(len(one) != count for one in columns.values()):
        raise InterventionError(
            f"columns of {', '.join(f'{len(one)} {name}' for name, one in columns.items())}: must fit"
        )
    if not bool(np.isfinite(columns["n"]).all()) or columns["n"].min() < 0:
        raise InterventionError(f"n={shown(list(columns['n']))}: must be over how many each number is a mean")
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
