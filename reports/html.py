"""``report.html``: one file that holds all that it shows. The matrix comes first, and each cell opens."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from itertools import groupby
from typing import NamedTuple

import jinja2

from pytest_circuitfreeze import benchmarks, matrix
from pytest_circuitfreeze.reports.document import Report
from pytest_circuitfreeze.reports.markdown import INCOMPLETE, facts
from pytest_circuitfreeze.results import WITHOUT_MODEL, Result, used

MARKS = {
    "pass": ("✓", "good"),
    "pass*": ("✓*", "good"),
    "in part": ("◐", "part"),
    "accepted": ("!", "part"),
    "refused": ("⊘", "part"),
    "not offered": ("○", "part"),
    "skip": ("»", "part"),
    "n/a": ("·", "none"),
    "-": ("-", "none"),
    "FAIL": ("✗", "bad"),
    "ERROR": ("✗", "bad"),
}
"""Of each word of the matrix a sign that is told apart without colour, and its colour."""

Plots = Mapping[str, Mapping[str, bytes]]
"""By theme and by the name of a plot an SVG file."""


class Cell(NamedTuple):
    """One claim on one model."""

    key: str
    """Names the part of the page that it opens."""
    model: str
    word: str
    sign: str
    colour: str
    share: float
    """Of its bound, that the largest error used; 0 to 1."""
    bounded: bool
    """Whether there is such a bound; bit for bit is none."""
    results: tuple[Result, ...]


class Row(NamedTuple):
    """One claim."""

    sentence: str
    cells: tuple[Cell, ...]
    closest: str


def render(report: Report, plots: Plots) -> str:
    """The whole page.

    Args:
        report: what it is about.
        plots: what it shows besides; none where they could not be drawn.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pytest_circuitfreeze.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"uri": _uri, "percent": _percent}
    return environment.get_template("report.html.jinja").render(
        report=report,
        incomplete="" if report.ended.complete else INCOMPLETE,
        totals=matrix.totals(report.results).splitlines() if report.results else [],
        models=matrix.columns(report.results, report.targets),
        subjects=_subjects(report),
        marks=MARKS,
        reasons=matrix.reasons(report.results),
        tables=benchmarks.tables(report.benchmarks),
        about_benchmarks=benchmarks.ABOUT,
        plots={name: {theme: plots[theme][name] for theme in plots} for name in next(iter(plots.values()), {})},
        facts=facts(report),
    )


def _subjects(report: Report) -> list[tuple[str, list[Row]]]:
    """The rows of the matrix by what they are about."""
    models = matrix.columns(report.results, report.targets)
    by_claim: dict[tuple[str, str], list[Result]] = {}
    for result in report.results:
        by_claim.setdefault((result.file, result.claim), []).append(result)
    rows = []
    for number, row in enumerate(matrix.rows(report.results, models)):
        own = by_claim[row.file, row.claim]
        cells = tuple(_cell(f"c{number}-{at}", own, model) for at, model in enumerate(models))
        rows.append((row.file, Row(row.sentence, cells, row.closest)))
    return [
        (matrix.subject(file), [row for _, row in group]) for file, group in groupby(rows, key=lambda pair: pair[0])
    ]


def _cell(key: str, results: list[Result], model: str) -> Cell:
    own = tuple(result for result in results if (result.model or WITHOUT_MODEL) == model)
    word = matrix.cell(own, model)
    sign, colour = MARKS[word]
    held = [one for one in own if one.outcome == "passed" and one.bound > 0]
    share = max((used(one.error, one.bound) for one in held), default=0.0)
    return Cell(key, model, word, sign, colour, share, bool(held), own)


def _percent(share: float) -> str:
    return f"{share:.1%}" if 0 < share < 0.1 else f"{share:.0%}"


def _uri(picture: bytes) -> str:
    """A picture as an address that holds it."""
    return f"data:image/svg+xml;base64,{b64encode(picture).decode()}"


def pictures(drawn: Mapping[str, Mapping[str, Mapping[str, bytes]]]) -> Plots:
    """The SVG files among what `plots.draw` gave for each theme."""
    return {theme: {name: files["svg"] for name, files in made.items()} for theme, made in drawn.items()}
