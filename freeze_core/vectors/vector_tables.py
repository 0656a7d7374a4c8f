"""The evaluation of a vector as tables for people: Markdown, and LaTeX for a paper."""

from __future__ import annotations

from typing import TYPE_CHECKING

from freeze_core.results.tables import UNITS, Table, shown_with_interval

if TYPE_CHECKING:
    from freeze_core.vectors.effects import SteeringEffects
    from freeze_core.vectors.vector import InterventionVector

__all__ = ["tables_of"]


def tables_of(vector: InterventionVector) -> list[Table]:
    """How well the vector tells held-out prompts apart, and what adding it does."""
    return [_separation(vector), *([_effects(vector, vector.effects)] if vector.effects else [])]


def _separation(vector: InterventionVector) -> Table:
    apart, steady = vector.separation, vector.stability
    spread = f" [{steady.low:.3g}, {steady.high:.3g}]" if steady.splits > 1 else ""
    norm = float(vector.vector.double().norm())
    cells = [
        [
            vector.method,
            str(vector.layer),
            shown_with_interval(apart.auc),
            shown_with_interval(apart.accuracy, 100),
            f"{steady.value:.3g}{spread}",
            f"{norm:.3g}",
            f"{vector.typical_norm:.3g}",
        ]
    ]
    headers = ["method", "layer", "AUC", "accuracy (%)", "cosine of halves", "norm", "norm of the stream"]
    positive, negative = (len(one) for one in vector.held_out)
    how = "pairs" if vector.paired else "prompts"
    of_halves = (
        f", the middle {100 * vector.resampling.settings['confidence']:g} % of {steady.splits} random halvings"
        if steady.splits > 1
        else ""
    )
    caption = (
        f"{vector.origin['model']}, a vector of the residual stream after layer {vector.layer}, found on "
        f"{vector.found[0]} positive and {vector.found[1]} negative prompts, judged on n = {positive} positive and "
        f"{negative} negative ones held out, by their projections on it. {vector.resampling.note(how)}. "
        f"The cosine is of the vectors of two halves of the prompts that it was found on{of_halves}; norms are mean "
        "lengths."
    )
    return Table(headers, cells, caption)


def _effects(vector: InterventionVector, effects: SteeringEffects) -> Table:
    cells = [
        [
            f"{row.strength:g}",
            shown_with_interval(row.change),
            shown_with_interval(row.control),
            f"{row.control_largest:.3g}",
            shown_with_interval(row.difference),
            f"{row.p_value:.2g}",
            f"{row.p_adjusted:.2g}",
        ]
        for row in effects.rows
    ]
    unit = f" ({UNITS[effects.metric]})" if effects.metric in UNITS else ""
    changes = [f"{name}{unit}" for name in ("change", "random vectors", "largest of these", "difference")]
    headers = ["strength", *changes, "p", "p, adjusted"]
    number = effects.controls.shape[1]
    caption = (
        f"Change of {effects.metric}, {float(effects.clean.mean()):.3g} on average without the vector, when "
        f"the vector is added at positions {effects.positions}: n = {len(effects.clean)} prompts that it was not "
        f"found on, beside the mean over {number} random vectors of the same norm. "
        f"{vector.resampling.note('prompts')}; p of a paired sign-flip test of the difference, adjusted for all "
        "strengths (Benjamini-Yekutieli)."
    )
    return Table(headers, cells, caption)
