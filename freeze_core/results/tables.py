"""Results as tables: a DataFrame to compute with, Markdown to read, and LaTeX for a paper."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

from tabulate import tabulate

from freeze_core.extras import extra
from freeze_core.results.intervals import Estimate

__all__ = ["UNITS", "Framed", "Printed", "Table", "frame", "interval_columns", "shown_with_interval", "unit_of"]

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


class Table(NamedTuple):
    """Cells under headers, and a caption that says of what they are."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str

    def markdown(self) -> str:
        """The table, with its caption below."""
        rows = [[_unmarked(cell) for cell in row] for row in self.rows]
        headers = [_unmarked(header) for header in self.headers]
        table = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
        return f"{table}\n\n{_unmarked(self.caption)}\n"

    def latex(self) -> str:
        """A `table` environment with rules of booktabs."""
        table = tabulate(self.rows, self.headers, tablefmt="latex_booktabs", disable_numparse=True)
        # A row must not begin with what the end of the row before it would take for an option.
        table = re.sub(r"^( *)([\[*])", r"\1{\2}", table, flags=re.MULTILINE)
        caption = "".join(SPECIAL.get(letter, letter) for letter in self.caption)
        return "\n".join(["\\begin{table}", "\\centering", table, f"\\caption{{{caption}}}", "\\end{table}", ""])


class Framed(ABC):
    """A result that a DataFrame can hold."""

    @abstractmethod
    def records(self) -> list[dict[str, Any]]:
        """The rows of the frame, each by the names of the columns."""

    def to_frame(self) -> Any:
        """A tidy pandas `DataFrame`: one row a measurement, with the columns that the class lists.

        Raises:
            ImportError: pandas is not installed.
        """
        return frame(self.records())


class Printed(ABC):
    """A result that is printed as one table, or several."""

    @abstractmethod
    def _tables(self) -> list[Table]:
        """The tables, in order."""

    def to_markdown(self) -> str:
        """The numbers with intervals and units, and a caption that says of what they are."""
        return "\n".join(table.markdown() for table in self._tables())

    def to_latex(self) -> str:
        """The same as LaTeX, for the package booktabs."""
        return "\n".join(table.latex() for table in self._tables())


def frame(rows: Sequence[Any], columns: Sequence[str] | None = None) -> Any:
    """A pandas `DataFrame`.

    Raises:
        ImportError: pandas is not installed.
    """
    pandas = extra("pandas", "to_frame makes a DataFrame; the attributes of a result have the same numbers")
    return pandas.DataFrame(rows) if columns is None else pandas.DataFrame(rows, columns=columns)


def interval_columns(name: str, estimate: Estimate) -> dict[str, float]:
    """An estimate as columns of a frame: the number, and the ends of its interval."""
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def shown_with_interval(estimate: Estimate, unit: float = 1) -> str:
    """A number and, in brackets, its interval."""
    value, low, high = (f"{unit * number:.3g}" for number in estimate)
    return f"{value} [{low}, {high}]"


def unit_of(metric: str) -> str:
    """Of a built-in metric its unit, else its name."""
    return UNITS.get(metric, metric)


def _unmarked(text: str) -> str:
    """Text that Markdown prints as it stands: a metric of the user's own may be called `<lambda>`."""
    return re.sub(r"([\\<|*`])", r"\\\1", text)
