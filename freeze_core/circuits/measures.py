"""A number for each head under each of some names: what it is by its patterns, or by its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from freeze_core.arguments import check_choice, check_int
from freeze_core.results.intervals import Estimate
from freeze_core.results.tables import Table, frame, shown_with_interval

__all__ = ["HeadMeasures"]


class _Cell(NamedTuple):
    measure: str
    layer: int
    head: int
    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class HeadMeasures:
    """Measures of heads.

    Args:
        values: by name a tensor `[layer, head]` in float64; nan where there is no head, or none that was asked for.
        n: over how many sequences each is a mean; 0 of what is read off weights.
        unit: of the values.
        about: of what they are, in a sentence.
        low, high: by name the ends of the intervals `[layer, head]`; none of what is read off weights.
    """

    values: Mapping[str, Tensor]
    n: int
    unit: str
    about: str
    low: Mapping[str, Tensor] = field(default_factory=dict)
    high: Mapping[str, Tensor] = field(default_factory=dict)

    def top(self, measure: str, count: int = 10) -> list[tuple[int, int]]:
        """The `(layer, head)` of the `count` largest values of one measure, largest first.

        Raises:
            InterventionError: no such measure, or a count that is none.
        """
        check_choice("measure", measure, self.values)
        return [(cell.layer, cell.head) for cell in self._largest(measure, count)]

    def to_frame(self) -> Any:
        """A pandas `DataFrame`, one row a value: `measure`, `layer`, `head`, `value`, `low`, `high`, `n` and `unit`.

        Raises:
            ImportError: pandas is not installed.
        """
        rows = [(*cell, self.n, self.unit) for measure in self.values for cell in self._cells(measure)]
        return frame(rows, [*_Cell._fields, "n", "unit"])

    def to_markdown(self, count: int = 10) -> str:
        """The `count` largest heads of each measure, and below them what they are."""
        return self._table(count).markdown()

    def to_latex(self, count: int = 10) -> str:
        """The same with its caption as LaTeX, for the package booktabs."""
        return self._table(count).latex()

    def _table(self, count: int) -> Table:
        rows = [
            [measure.replace("_", " "), f"{cell.layer}.{cell.head}", self._shown(cell)]
            for measure in self.values
            for cell in self._largest(measure, count)
        ]
        return Table(["measure", "head", f"value ({self.unit})"], rows, self.about)

    def _shown(self, cell: _Cell) -> str:
        return shown_with_interval(Estimate(cell.value, cell.low, cell.high)) if self.low else f"{cell.value:.3g}"

    def _largest(self, measure: str, count: int) -> list[_Cell]:
        check_int("count", count, 1)
        return sorted(self._cells(measure), key=lambda cell: -cell.value)[:count]

    def _cells(self, measure: str) -> Iterator[_Cell]:
        values = self.values[measure]
        low, high = (ends.get(measure, values * float("nan")) for ends in (self.low, self.high))
        for layer, head in (~values.isnan()).nonzero().tolist():
            at = layer, head
            yield _Cell(measure, layer, head, float(values[at]), float(low[at]), float(high[at]))
