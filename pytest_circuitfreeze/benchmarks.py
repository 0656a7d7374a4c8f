"""Benchmarks as tables: what each contender costs, with its spread, beside what it should cost at most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Benchmark = Mapping[str, Any]
"""``group``, ``row`` (what was measured), ``engine``, ``ratios`` by contender (``median``, ``low`` and ``high``
quartiles, ``n`` rounds), ``target`` (or ``None``), ``missing`` (contenders that could not run, and why)."""

ABOUT = (
    "Ratios of time to the plain calls between which they stand: median [quartiles], n rounds. A number alone was "
    "counted once: graphs, or bytes as a share of the parameters'."
)


class Table(NamedTuple):
    """The benchmarks of one group, a row each."""

    group: str
    heads: list[str]
    rows: list[list[str]]

    def text(self, style: str) -> str:
        """The table in one of tabulate's formats."""
        from tabulate import tabulate

        # Nothing is a number to tabulate: a cell is a number with its spread.
        return tabulate(self.rows, self.heads, tablefmt=style, disable_numparse=True)


def tables(benchmarks: Sequence[Benchmark]) -> list[Table]:
    """One table a group, in order."""
    made = []
    for group in dict.fromkeys(one["group"] for one in benchmarks):
        own = [one for one in benchmarks if one["group"] == group]
        names = list(dict.fromkeys(name for one in own for name in one["ratios"]))
        rows = [
            [one["row"], *(shown(one["ratios"].get(name)) for name in names), limit(one), verdict(one)] for one in own
        ]
        made.append(Table(group, ["", *names, "at most", ""], rows))
    return made


def shown(spread: Mapping[str, float] | None) -> str:
    """A median with its quartiles and the number of rounds; a dash for what was not measured."""
    if spread is None:
        return "-"
    if spread["n"] == 1:
        return f"{spread['median']:.3g}"
    return f"{spread['median']:.3f} [{spread['low']:.3f}, {spread['high']:.3f}] n={spread['n']}"


def limit(one: Benchmark) -> str:
    """What the engine may cost at most, if anything is said of it."""
    return "" if one["target"] is None else f"{one['target']:.3g}"


def verdict(one: Benchmark) -> str:
    """Whether the median of what is measured keeps its target."""
    if one["target"] is None:
        return ""
    return "reached" if one["ratios"][one["engine"]]["median"] <= one["target"] else "not reached"
