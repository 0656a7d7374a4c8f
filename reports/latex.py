"""LaTeX tables for the package booktabs: ``claims.tex`` and ``benchmarks.tex``, each to be read by \\input."""

from __future__ import annotations

import re

from tabulate import tabulate

from pytest_circuitfreeze import benchmarks, matrix
from pytest_circuitfreeze.reports.document import Report

STYLE = "latex_booktabs"
"""tabulate's, which escapes what means something to LaTeX."""


def claims(report: Report) -> str:
    """A row a claim, a column a model, and how much of its bound the largest error used."""
    models = matrix.columns(report.results, report.targets)
    rows = [[row.sentence, *row.cells, row.closest] for row in matrix.rows(report.results, models)]
    made = _protected(tabulate(rows, ["claim", *models, "of bound"], tablefmt=STYLE, disable_numparse=True))
    # A sentence is folded; the other columns are as wide as their words.
    return _comment(report) + made.replace("{tabular}{l", r"{tabular}{p{0.5\linewidth}", 1) + "\n"


def measured(report: Report) -> str:
    """The benchmarks, one table a group."""
    tables = benchmarks.tables(report.benchmarks)
    return _comment(report) + "\n".join(
        f"% {_line(table.group)}\n{_protected(table.text(STYLE))}\n" for table in tables
    )


def _protected(table: str) -> str:
    """The table, none of whose rows begins with what the end of the row before it would take for an option."""
    return re.sub(r"^( *)([\[*])", r"\1{\2}", table, flags=re.MULTILINE)


def _comment(report: Report) -> str:
    found = " ".join(f"{name} {version};" for name, version in report.environment.items())
    return f"% engine {_line(report.settings['engine'])}; {_line(found)} needs the package booktabs\n"


def _line(text: str) -> str:
    """A comment ends where its line does."""
    return " ".join(text.split())
