"""An ablation study as points with intervals, a panel for each measure."""

from __future__ import annotations

from typing import Any

import numpy as np

from freeze_core.errors import InterventionError, shown
from freeze_core.plots.style import figure
from freeze_core.studies.results import AblationStudy

__all__ = ["plot_ablation"]

MEASURES = {
    "perplexity": "perplexity",
    "accuracy": "accuracy (share of tokens)",
    "kl": "KL to clean (nats/token)",
    "effect_size": "effect size (d)",
}


def plot_ablation(study: AblationStudy) -> Any:
    """What freezing each circuit did, each number with its interval; a dashed line is the unfrozen model.

    An end that is infinite is an arrow.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        InterventionError: `study` is no `AblationStudy`.
        ImportError: matplotlib is not installed.
    """
    if not isinstance(study, AblationStudy):
        raise InterventionError(f"study={shown(study)}: must be what run_circuit_ablation_study returns")
    rows = study.rows
    made = figure(3.0 * len(MEASURES), 1.8 + 0.35 * len(rows))
    axes = made.subplots(1, len(MEASURES), sharey=True)
    for axis, (measure, label) in zip(axes, MEASURES.items(), strict=True):
        axis.axvline(getattr(study.clean, measure).value, color="0.4", linestyle="--", linewidth=1.2)
        for place, row in enumerate(rows):
            _interval(axis, place, *getattr(row, measure))
        axis.set_xlabel(label)
        axis.grid(axis="x", color="0.9")
        axis.set_axisbelow(True)
        axis.xaxis.get_major_locator().set_params(nbins=4)
        axis.margins(x=0.12)
    axes[0].set_yticks(range(len(rows)), [row.circuit for row in rows])
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    axes[0].set_ylabel("frozen circuit")
    config, confidence = study.config, study.resampling.settings["confidence"]
    made.suptitle(
        f"{study.origin['model']}, {config.freeze_type}, strength {config.strength:g}: n = {len(study.targets)} "
        f"sequences, {int(study.targets.sum())} tokens, {100 * confidence:g} % intervals; dashed: unfrozen",
        fontsize="medium",
        wrap=True,
    )
    return made


def _interval(axis: Any, place: int, value: float, low: float, high: float) -> None:
    """A point with its interval; ends beyond all bounds are arrows from it."""
    ends = [end for end in (low, high) if np.isfinite(end)]
    if np.isfinite(value):
        axis.plot(value, place, color="black", marker="o", markersize=6)
        ends.append(value)
    if ends:
        axis.hlines(place, min(ends), max(ends), color="#0072b2", linewidth=2.5, zorder=1)
        for end, marker, edge in ((low, "<", min(ends)), (high, ">", max(ends))):
            if not np.isfinite(end):
                axis.plot(edge, place, color="#0072b2", marker=marker, markersize=11, zorder=0)
