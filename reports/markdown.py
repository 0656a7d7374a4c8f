"""``report.md``: the table of claims by models, what failed, and what was run."""

from __future__ import annotations

from itertools import groupby
from textwrap import indent

from tabulate import tabulate

from pytest_circuitfreeze import matrix
from pytest_circuitfreeze.reports.document import Report
from pytest_circuitfreeze.results import Result


def render(report: Report) -> str:
    """The whole document."""
    parts = [
        f"# circuitfreeze: {_escape(report.settings['engine'])}",
        matrix.totals(report.results),
        *_tables(report),
        *_failures(report.results),
        *_reasons(report.results),
        "## What was run",
        _table([[name, _shown(value)] for name, value in report.settings.items()], ["setting", "value"]),
        _table(list(report.environment.items()), ["software", "version"]),
    ]
    return "\n\n".join(parts) + "\n"


def _tables(report: Report) -> list[str]:
    """One table a suite file: a row a claim, in its own words, a column a model."""
    models = matrix.columns(report.results, report.targets)
    heads = ["claim", *map(_escape, models), "of bound"]
    rows = matrix.rows(report.results, models)
    parts = []
    for file, group in groupby(rows, key=lambda row: row.file):
        parts.append(f"## {_escape(_capital(matrix.subject(file)))}")
        parts.append(_table([[_escape(row.sentence), *row.cells, row.closest] for row in group], heads))
    return parts


def _capital(text: str) -> str:
    """With a capital, but for a path."""
    return text if "/" in text or "." in text else text.capitalize()


def _failures(results: tuple[Result, ...]) -> list[str]:
    failed = [result for result in results if result.outcome in ("failed", "error")]
    if not failed:
        return []
    return ["## What failed", "\n".join(map(_failure, failed))]


def _failure(result: Result) -> str:
    """One failure as a list item, with the snippet that shows it again, if there is one."""
    line = f"- `{result.id}`: {_escape(result.message)}"
    snippet = (result.failure or {}).get("snippet")
    if snippet is None:
        return line
    block = f"```python\n{snippet}```\n"
    return f"{line}\n\n{indent(block, '  ')}"


def _reasons(results: tuple[Result, ...]) -> list[str]:
    told = matrix.reasons(results)
    return (
        [
            "## What is accepted, was refused, is not offered, or does not apply",
            "\n".join(f"- {_escape(line)}" for line in told),
        ]
        if told
        else []
    )


def _table(rows: list[list[str]] | list[tuple[str, str]], heads: list[str]) -> str:
    # Nothing is a number to tabulate: '12%' and 'exact' stand in one column, a version is no float.
    return tabulate(rows, heads, tablefmt="github", disable_numparse=True)


def _shown(value: object) -> str:
    if isinstance(value, list):
        return _escape(", ".join(map(str, value))) or "none"
    return "default" if value is None else _escape(str(value))


def _escape(text: str) -> str:
    """Keeps text from ending a cell or being read as mark-up."""
    for character in r"\|*_`<":
        text = text.replace(character, "\\" + character)
    return text.replace("\n", " ")
