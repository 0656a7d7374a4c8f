"""Scores and measures of heads as heatmaps, layer by head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from freeze_core.arguments import check_type, refuse
from freeze_core.circuits.measures import HeadMeasures
from freeze_core.plots.heatmap import draw_heatmaps
from freeze_core.plots.style import array
from freeze_core.results.tables import UNITS
from freeze_core.scoring.scores import HeadScores

__all__ = ["plot_head_measures", "plot_head_scores"]


def plot_head_scores(scores: HeadScores, unit: str | None = None) -> Any:
    """What freezing each head's circuit changes, a heatmap a circuit (QK beside OV) on one scale symmetric about 0.

    Of a screened sweep, heads with a dot were computed, the others estimated.

    Args:
        unit: of a metric of your own.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        InterventionError: `scores` is no `HeadScores`.
        ImportError: matplotlib is not installed.
    """
    check_type("scores", scores, HeadScores, "what score_heads returns")
    panels = {circuit.upper(): array(circuit, one, 2) for circuit, one in scores.scores.items()}
    exact = {circuit.upper(): array(circuit, one, 2) > 0 for circuit, one in scores.exact.items()}
    mixed = scores.method == "screened" and exact.keys() == panels.keys()
    of = unit or UNITS.get(scores.metric)
    metric = scores.metric.replace("_", " ")
    return draw_heatmaps(
        panels,
        unit=f"change of {metric}{f' ({of})' if of else ''}",
        n=f"n = {scores.rows} rows",
        title=f"Each head's circuit frozen alone ({scores.method}{', dots: exact' if mixed else ''}); "
        f"unfrozen {metric}: {scores.clean:.3g}",
        row="layer",
        column="query head",
        marked=exact if mixed else None,
    )


def plot_head_measures(measures: HeadMeasures, names: Sequence[str] | None = None) -> Any:
    """Pattern scores or copying scores, a heatmap each on one scale.

    Args:
        names: which measures; `None` is all of them.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        InterventionError: `measures` is none, or has no such name.
        ImportError: matplotlib is not installed.
    """
    check_type("measures", measures, HeadMeasures, "what pattern_scores or copying_scores returns")
    chosen = list(measures.values) if names is None else list(names)
    unknown = [name for name in chosen if name not in measures.values]
    if unknown or not chosen:
        refuse("names", names, f"some of {', '.join(measures.values)}")
    return draw_heatmaps(
        {name.replace("_", " "): array(name, measures.values[name], 2) for name in chosen},
        unit=measures.unit,
        n=f"n = {measures.n} sequences" if measures.n else "read off weights",
        title=measures.about.partition(":")[0],
        row="layer",
        column="query head",
        share=bool(measures.low),
    )
