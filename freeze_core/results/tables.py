"""A study as a table for people: Markdown, and LaTeX for a paper."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tabulate import tabulate

from freeze_core.results.intervals import Estimate

if TYPE_CHECKING:
    from freeze_core.studies.ablation_result import AblationStudy, Row

__all__ = ["UNITS", "as_latex", "as_markdown", "latex", "markdown", "protected", "shown_with_interval", "unit_of"]


HEADERS = ["circuit", "perplexity", "accuracy (%)", "KL to clean (nats/token)", "effect size (d)", "p", "p, adjusted"]

UNITS = {"logit_difference": "logits", "loss": "nats/token", "kl": "nats/token", "probability": "probability"}
"""Of the built-in metrics; one of the user's own has a unit of its own."""

SPECIAL = {letter: f"\\{letter}" for letter in "%_&#${}"} | {
    "\\": "\\textbackslash{}",
    "^": "\\textasciicircum{}",
    "~": "\\textasciitilde{}",
    "<": "\\ensuremath{<}",
    ">": "\\ensuremath{>}",
}
"""What LaTeX would not print as it stands."""


def markdown(study: AblationStudy) -> str:
    """The table, and below it what it is of."""
    return as_markdown(HEADERS, _cells(study), _caption(study))


def latex(study: AblationStudy) -> str:
    """A `table` environment with rules of booktabs."""
    return as_latex(HEADERS, _cells(study), _caption(study))


def as_markdown(headers: Sequence[str], cells: Sequence[Sequence[str]], caption: str) -> str:
    """A table, and below it what it is of."""
    rows = [[_unmarked(cell) for cell in row] for row in cells]
    table = tabulate(rows, [_unmarked(header) for header in headers], tablefmt="github", disable_numparse=True)
    return f"{table}\n\n{_unmarked(caption)}\n"


def as_latex(headers: Sequence[str], cells: Sequence[Sequence[str]], caption: str) -> str:
    """A `table` environment with rules of booktabs."""
    table = protected(tabulate(cells, headers, tablefmt="latex_booktabs", disable_numparse=True))
    return "\n".join(["\\begin{table}", "\\centering", table, f"\\caption{{{_escaped(caption)}}}", "\\end{table}", ""])


def _escaped(text: str) -> str:
    """Text that LaTeX prints as it stands."""
    return "".join(SPECIAL.get(letter, letter) for letter in text)


def protected(table: str) -> str:
    """A LaTeX table, none of whose rows begins with what the end of the row before it would take for an option."""
    return re.sub(r"^( *)([\[*])", r"\1{\2}", table, flags=re.MULTILINE)


def _unmarked(text: str) -> str:
    """Text that Markdown prints as it stands: a metric of the user's own may be called `<lambda>`."""
    return re.sub(r"([\\<|*`])", r"\\\1", text)


def _cells(study: AblationStudy) -> list[list[str]]:
    clean = study.clean
    first = [clean.circuit, shown_with_interval(clean.perplexity), shown_with_interval(clean.accuracy, 100), *4 * ["-"]]
    return [first, *(_of(row) for row in study.rows)]


def _of(row: Row) -> list[str]:
    return [
        row.circuit,
        shown_with_interval(row.perplexity),
        shown_with_interval(row.accuracy, 100),
        shown_with_interval(row.kl),
        shown_with_interval(row.effect_size),
        f"{row.p_value:.2g}",
        f"{row.p_adjusted:.2g}",
    ]


def shown_with_interval(estimate: Estimate, unit: float = 1) -> str:
    """A number and, in brackets, its interval."""
    value, low, high = (f"{unit * number:.3g}" for number in estimate)
    return f"{value} [{low}, {high}]"


def _caption(study: AblationStudy) -> str:
    config, resampling = study.config, study.resampling.settings
    where = f"{_named(config.layer_indices, 'layer')}, {_named(config.head_indices, 'query head')}"
    if study.heads is not None:
        where = ", ".join(f"layer {layer} {_named(heads, 'query head')}" for layer, heads in study.heads.items())
    how = f"{config.freeze_type}, strength {config.strength:g}, kv_scope {config.kv_scope}"
    return (
        f"{study.origin['model']}, {where}, each circuit frozen alone: {how}. "
        f"n = {len(study.targets)} sequences, {int(study.targets.sum())} predicted tokens. In brackets "
        f"{100 * resampling['confidence']:g} % expanded percentile bootstrap intervals over sequences; p of a paired "
        "sign-flip test of the mean loss, adjusted for all circuits (Benjamini-Yekutieli)."
    )


def _named(indices: Sequence[int] | None, what: str) -> str:
    if indices is None:
        return f"all {what}s"
    return f"{what}{'s' if len(indices) > 1 else ''} {', '.join(map(str, indices))}"


def unit_of(metric: str) -> str:
    """Of a built-in metric its unit, else its name."""
    return UNITS.get(metric, metric)
