"""What a person reads: the header's line, and the table of claims by models at the end."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from typing import TYPE_CHECKING

import pytest

from pytest_circuitfreeze import __version__, benchmarks, matrix
from pytest_circuitfreeze.accepted import AcceptedFailures
from pytest_circuitfreeze.results import Result
from pytest_circuitfreeze.settings import Settings

if TYPE_CHECKING:
    from _pytest._io import TerminalWriter

_COLOURS = {
    **dict.fromkeys(("FAIL", "ERROR"), "red"),
    **dict.fromkeys(("accepted", "skip", "refused", "not offered", "in part"), "yellow"),
    **dict.fromkeys(("pass*", "pass"), "green"),
}
_LAST_HEAD = ("of", "bound")
_GAP = "  "
_NARROWEST_LABEL = 24
_FOLD = 8


def versions() -> dict[str, str]:
    """The versions of what a result depends on, found without importing any of it."""
    found = {"pytest-circuitfreeze": __version__}
    for name in ("torch", "transformers", "hypothesis", "pytest", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def header(settings: Settings) -> str:
    """One line: the version, what is under test, and how."""
    found = versions()
    where = ", ".join(word for word in (settings.device, settings.dtype, settings.attn) if word)
    return (
        f"circuitfreeze: {__version__}, engine {settings.engine} on {', '.join(settings.targets)}; "
        f"profile {settings.profile}, seed {settings.seed}; {where}; "
        f"torch {found['torch']}, transformers {found['transformers']}"
    )


def write_summary(terminal: pytest.TerminalReporter, results: Sequence[Result], settings: Settings) -> None:
    """The section ``circuitfreeze``: the table, what went wrong before a test could run, and the totals."""
    terminal.section(f"circuitfreeze: {settings.engine}")
    # The reporter's own write_line may start with an empty line; the writer below it does what it is told.
    writer = terminal.config.get_terminal_writer()
    measured = [result.benchmark for result in results if result.benchmark]
    results = [result for result in results if not result.is_benchmark]
    if results:
        _write_table(writer, results, settings.targets)
        writer.line()
    for message in dict.fromkeys(result.message for result in results if result.outcome == "error"):
        writer.line(f"ERROR {message}", red=True)
    for line in matrix.reasons(results):
        writer.line(line, yellow=True)
    for entry in AcceptedFailures(settings.accepted).elsewhere(settings.targets):
        writer.line(f"accepted, of a model that is not in this run: {entry}", yellow=True)
    if results:
        writer.line(matrix.totals(results))
    for table in benchmarks.tables(measured):
        writer.line()
        writer.line(f"{table.group}: {benchmarks.ABOUT}", bold=True)
        writer.line(table.text("simple"))


def _write_table(writer: TerminalWriter, results: Sequence[Result], order: Sequence[str]) -> None:
    """The table; heads are folded where the terminal is narrow, and what still does not fit starts a new block."""
    models = matrix.columns(results, order)
    rows = matrix.rows(results, models)
    full = writer.fullwidth
    label = max(len(_GAP + matrix.words(row.claim)) for row in rows)
    cells = [[row.cells[at] for row in rows] for at in range(len(models))]
    heads = [[model] for model in models]
    if label + _width(heads, cells) > full:
        heads = [_fold(model) for model in models]
        label = min(label, max(_NARROWEST_LABEL, full - _width(heads, cells)))
    widest = max(len(_GAP) + _cell_width([*head, *column]) for head, column in zip(heads, cells, strict=True))
    fitting = max(1, (full - label - _width([], [])) // widest)
    if label + _width(heads, cells) <= full:
        fitting = len(heads)
    for start in range(0, len(heads), fitting):
        _write_block(writer, rows, slice(start, start + fitting), heads, label)


def _write_block(
    writer: TerminalWriter,
    rows: Sequence[matrix.Row],
    shown: slice,
    heads: Sequence[Sequence[str]],
    label: int,
) -> None:
    """The table's columns ``shown``, each as wide as its head, beside the claims."""
    heads = [*heads[shown], _LAST_HEAD]
    columns = [*zip(*(row.cells[shown] for row in rows), strict=True), ()]
    widths = [_cell_width([*head, *column]) for head, column in zip(heads, columns, strict=True)]
    depth = max(map(len, heads))
    for line in range(depth):
        words = [head[line - depth + len(head)] if line >= depth - len(head) else "" for head in heads]
        writer.write(" " * label)
        writer.line(_cells(words, widths), bold=True)
    for file, group in groupby(rows, key=lambda row: row.file):
        writer.line(matrix.subject(file), bold=True)
        for row in group:
            writer.write(_shorten(_GAP + matrix.words(row.claim), label))
            for cell, width in zip((*row.cells[shown], row.closest), widths, strict=True):
                colour = {_COLOURS[cell]: True} if cell in _COLOURS else {}
                writer.write(_cells([cell], [width]), **colour)
            writer.line()


def _cells(words: Sequence[str], widths: Sequence[int]) -> str:
    return "".join(_GAP + word.rjust(width) for word, width in zip(words, widths, strict=True))


def _width(heads: Sequence[Sequence[str]], cells: Sequence[Sequence[str]]) -> int:
    """What all columns but the first take, the last one included."""
    columns = [[*head, *column] for head, column in zip(heads, cells, strict=True)]
    return sum(len(_GAP) + _cell_width(words) for words in (*columns, _LAST_HEAD))


def _cell_width(words: Sequence[str]) -> int:
    return max(map(len, [*words, "ERROR"]))


def _fold(name: str) -> list[str]:
    """A name in short lines, broken after ``_ - . /`` where there is one."""
    lines = [""]
    for piece in re.findall(rf"[^_\-./]{{1,{_FOLD - 1}}}[_\-./]?|[_\-./]", name):
        if len(lines[-1]) + len(piece) > _FOLD:
            lines.append("")
        lines[-1] += piece
    return lines


def _shorten(text: str, width: int) -> str:
    return text.ljust(width) if len(text) <= width else text[: width - 3] + "..."
