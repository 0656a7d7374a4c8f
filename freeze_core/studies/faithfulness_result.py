"""What is found of a set of heads: the metric of each prompt in four runs, and the ratios that are made of it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from torch import Tensor

from freeze_core.extras import extra
from freeze_core.results.intervals import Estimate, Resampling
from freeze_core.results.tables import as_latex, as_markdown, shown_with_interval, unit_of
from freeze_core.studies.statistics import average, ratio

__all__ = ["RUNS", "Faithfulness"]

RUNS = ("model", "empty", "circuit", "complement")
"""As it is; with all heads frozen; with all frozen but those of the set; with those of the set frozen."""

MEANT = {
    "model": "m(M), nothing frozen",
    "empty": "m(empty), all heads frozen",
    "circuit": "m(C), all frozen but the set",
    "complement": "m(M without C), the set frozen",
    "gap": "m(M) - m(empty)",
    "faithfulness": "faithfulness, of the set alone",
    "completeness": "completeness, of what is left without it",
}


NAMED = 12
"""Of so many heads at most a caption says which; `Faithfulness.settings` does of any."""


class Faithfulness:
    """Measurements of a set of heads; ratios are made of them when they are asked for, and the same each time.

    Args:
        values: the metric of each prompt `[prompt]` in float64, by run: `model`, `empty`, `circuit` and `complement`.
        settings: the arguments, but for model, inputs, `corrupted` and `statistics`, with which `measure_faithfulness`
            makes it again; of a metric of one's own its name.
        all_heads: how many the model has.
        origin: of which model, data, statistics and versions.
        resampling: how intervals are made.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        settings: Mapping[str, Any],
        all_heads: int,
        origin: Mapping[str, str],
        resampling: Resampling,
    ) -> None:
        self.values = dict(values)
        self.settings = {**settings, **resampling.settings}
        self.all_heads = all_heads
        self.origin = dict(origin)
        self.resampling = resampling

    @property
    def n(self) -> int:
        """How many prompts."""
        return len(self.values["model"])

    @cached_property
    def means(self) -> dict[str, Estimate]:
        """The metric of each run, the mean over prompts."""
        return {run: self.resampling.estimate(average, self.values[run]) for run in RUNS}

    @cached_property
    def gap(self) -> Estimate:
        """m(M) - m(empty), which there is to keep. Where its interval holds 0, the ratios are of nothing sure."""
        return self.resampling.estimate(average, self._gap)

    @property
    def _gap(self) -> Tensor:
        return self.values["model"] - self.values["empty"]

    @cached_property
    def faithfulness(self) -> Estimate:
        """(m(C) - m(empty)) / (m(M) - m(empty)), 1 where the set alone does what the model does."""
        return self._share("circuit")

    @cached_property
    def completeness(self) -> Estimate:
        """(m(M without C) - m(empty)) / (m(M) - m(empty)), 0 where nothing is left that does it without the set."""
        return self._share("complement")

    def _share(self, run: str) -> Estimate:
        """A ratio of means; infinite in draws of prompts in which freezing all heads changes nothing."""
        return self.resampling.estimate(ratio, self.values[run] - self.values["empty"], self._gap)

    @property
    def _rows(self) -> list[tuple[str, Estimate, str]]:
        unit = unit_of(self.settings["metric"])
        ratios = [("faithfulness", self.faithfulness, "ratio"), ("completeness", self.completeness, "ratio")]
        return [*((name, one, unit) for name, one in {**self.means, "gap": self.gap}.items()), *ratios]

    def to_frame(self) -> Any:
        """A tidy pandas `DataFrame`, one row a `quantity`: the four runs, `gap`, `faithfulness`, `completeness`.

        Its other columns: `value`, `low`, `high`, `unit`, `n` prompts, `metric`, `circuit` and `freeze_type`.

        Raises:
            ImportError: pandas is not installed.
        """
        pandas = extra("pandas", "to_frame makes a DataFrame; means and faithfulness have the same numbers")
        told = {name: self.settings[name] for name in ("metric", "circuit", "freeze_type")}
        return pandas.DataFrame(
            [
                {"quantity": quantity, **estimate._asdict(), "unit": unit, "n": self.n, **told}
                for quantity, estimate, unit in self._rows
            ]
        )

    def to_markdown(self) -> str:
        """The table with intervals and units, and a line that says of what it is."""
        return as_markdown(*self._table())

    def to_latex(self) -> str:
        """The table with its caption as LaTeX, for the package booktabs."""
        return as_latex(*self._table())

    def _table(self) -> tuple[list[str], list[list[str]], str]:
        cells = [[MEANT[quantity], shown_with_interval(estimate), unit] for quantity, estimate, unit in self._rows]
        return ["quantity", "value", "unit"], cells, self._caption()

    def _caption(self) -> str:
        settings = self.settings
        chosen = sum(map(len, settings["heads"].values()))
        named = "; ".join(f"layer {layer}: {', '.join(map(str, some))}" for layer, some in settings["heads"].items())
        heads = f" ({named})" if chosen <= NAMED else ""
        calibrated = " of calibrated statistics" if "statistics" in self.origin else ""
        return (
            f"{self.origin['model']}, {settings['circuit']} of {chosen} of "
            f"{self.all_heads} heads{heads}: {settings['freeze_type']}{calibrated}, strength "
            f"{settings['strength']:g}, kv_scope {settings['kv_scope']}. m is {settings['metric']}; n = {self.n} "
            f"prompts. In brackets {100 * settings['confidence']:g} % expanded percentile bootstrap "
            "intervals over prompts."
        )
