"""An ablation study as points with intervals, a panel for each measure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from freeze_core.arguments import check_type
from freeze_core.plots.style import figure
from freeze_core.results.intervals import Estimate
from freeze_core.studies.ablation_result import AblationStudy

__all__ = ["plot_ablation"]

BAR = "#0072b2"

MEASURES = {
    "perplexity": "perplexity",
    "accuracy": "accuracy (share of tokens)",
    "kl": "KL to clean (nats/token)",
    "effect_size": "effect size (d)",
}


def plot_ablation(study: AblationStudy) -> Any:
    """What freezing each circuit did, each number with its interval; a dashed line is the unfrozen model.

    An end that is infinite is an arrow to the edge.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        InterventionError: `study` is no `AblationStudy`.
        ImportError: matplotlib is not installed.
    """
    check_type("study", study, AblationStudy, "what run_circuit_ablation_study returns")
    rows = study.rows
    made = figure(3.0 * len(MEASURES), 1.8 + 0.35 * len(rows))
    axes = made.subplots(1, len(MEASURES), sharey=True)
    for axis, (measure, label) in zip(axes, MEASURES.items(), strict=True):
        axis.axvline(getattr(study.clean, measure).value, color="0.4", linestyle="--", linewidth=1.2)
        axis.margins(x=0.12)
        _intervals(axis, [getattr(row, measure) for row in rows])
        axis.set_xlabel(label)
        axis.grid(axis="x", color="0.9")
        axis.set_axisbelow(True)
        axis.xaxis.get_major_locator().set_params(nbins=4)
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


def _intervals(axis: Any, estimates: Sequence[Estimate]) -> None:
    """A point with its interval for each estimate, one below the other; an infinite end is an arrow to the edge."""
    for place, (value, low, high) in enumerate(estimates):
        ends = [end for end in (low, value, high) if np.isfinite(end)]
        if np.isfinite(value):
            axis.plot(value, place, color="black", marker="o", markersize=6)
        if ends:
            axis.hlines(place, min(ends), max(ends), color=BAR, linewidth=2.5, zorder=1)
    left, right = axis.get_xlim()
    for place, (value, *_) in enumerate(estimates):
        for end, edge, marker in zip(estimates[place], (left, left, right), ("", "<", ">"), strict=True):
            if marker and not np.isfinite(end):
                start = value if np.isfinite(value) else (left + right) / 2
                axis.hlines(place, *sorted((start, edge)), color=BAR, linewidth=2.5, zorder=1)
                axis.plot(edge, place, color=BAR, marker=marker, markersize=10, clip_on=False)
    axis.set_xlim(left, right)
