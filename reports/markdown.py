"""``report.md``: the table of claims by models, what failed, and what was run."""

from __future__ import annotations

import re
from itertools import groupby
from textwrap import indent

from tabulate import tabulate

from pytest_circuitfreeze import benchmarks, matrix
from pytest_circuitfreeze.reports.document import Report
from pytest_circuitfreeze.results import Result

INCOMPLETE = "The run was stopped before its end: some tests that were chosen have no result here."


def render(report: Report) -> str:
    """The whole document."""
    parts = [
        f"# circuitfreeze: {escape(report.settings['engine'])}",
        *([] if report.ended.complete else [f"**{INCOMPLETE}**"]),
        *(map(escape, matrix.totals(report.results).splitlines()) if report.results else ()),
        *_tables(report),
        *_failures(report.failed),
        *_reasons(report.results),
        *_benchmarks(report),
        "## What was run",
        _table([[escape(name), shown(value)] for name, value in report.settings.items()], ["setting", "value"]),
        _table([[name, escape(value)] for name, value in facts(report).items()], ["of the run", ""]),
    ]
    return "\n\n".join(parts) + "\n"


def facts(report: Report) -> dict[str, str]:
    """When the run was, how long, and what software and machine it depends on."""
    return {
        "started": f"{report.ended.started:%Y-%m-%d %H:%M} UTC",
        "seconds": f"{report.ended.seconds:,.0f}",
        "exit status": str(report.ended.status),
        **report.environment,
    }


def shown(value: object) -> str:
    """A setting for a person."""
    if isinstance(value, list):
        return escape(", ".join(map(str, value))) or "none"
    return "default" if value is None else escape(str(value))


def escape(text: str) -> str:
    """Keeps text from ending a cell or being read as mark-up, or as a link or an image."""
    return " ".join(re.sub(r"([\\|*_`<\[\]~#&])", r"\\\1", text).split(" ")).replace("\n", " ")


def _tables(report: Report) -> list[str]:
    """One table a suite file: a row a claim, in its own words, a column a model."""
    models = matrix.columns(report.results, report.targets)
    heads = ["claim", *map(escape, models), "of bound"]
    rows = matrix.rows(report.results, models)
    parts = []
    for file, group in groupby(rows, key=lambda row: row.file):
        parts.append(f"## {escape(_capital(matrix.subject(file)))}")
        parts.append(_table([[escape(row.sentence), *row.cells, row.closest] for row in group], heads))
    return parts


def _capital(text: str) -> str:
    """With a capital, but for a path."""
    return text if "/" in text or "." in text else text.capitalize()


def _failures(failed: tuple[Result, ...]) -> list[str]:
    return ["## What failed", "\n".join(map(_failure, failed))] if failed else []


def _failure(result: Result) -> str:
    """One failure as a list item, with the snippet that shows it again, if there is one."""
    line = f"- {escape(result.id)}: {escape(result.message)}"
    snippet = (result.failure or {}).get("snippet")
    if snippet is None:
        return line
    fence = "`" * (1 + max([2, *(len(run) for run in re.findall("`+", snippet))]))
    block = f"{fence}python\n{snippet}{fence}\n"
    return f"{line}\n\n{indent(block, '  ')}"


def _reasons(results: tuple[Result, ...]) -> list[str]:
    told = matrix.reasons(results)
    return (
        [
            "## What is accepted, was refused, is not offered, or does not apply",
            "\n".join(f"- {escape(line)}" for line in told),
        ]
        if told
        else []
    )


def _benchmarks(report: Report) -> list[str]:
    if not report.benchmarks:
        return []
    parts = ["## Benchmarks", benchmarks.ABOUT]
    for table in benchmarks.tables(report.benchmarks):
        rows = [[escape(cell) for cell in row] for row in table.rows]
        parts += [f"### {escape(_capital(table.group))}", _table(rows, list(map(escape, table.heads)))]
    return parts


def _table(rows: list[list[str]], heads: list[str]) -> str:
    # Nothing is a number to tabulate: '12%' and 'exact' stand in one column, a version is no float.
    return tabulate(rows, heads, tablefmt="github", disable_numparse=True)
