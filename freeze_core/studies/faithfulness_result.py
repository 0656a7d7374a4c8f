"""What is found of a set of heads: the metric of each prompt in four runs, and the ratios that are made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from freeze_core.arguments import check_type, is_int
from freeze_core.files import Saved, as_json, check_values, parsed
from freeze_core.results.estimators import average, ratio
from freeze_core.results.intervals import Estimate, Resampling
from freeze_core.results.provenance import provenance_in
from freeze_core.results.tables import Framed, Printed, Table, shown_with_interval, unit_of

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


@dataclass(eq=False, repr=False)
class Faithfulness(Framed, Printed, Saved):
    """Measurements of a set of heads; ratios are made of them when they are asked for, and the same each time.

    Args:
        values: the metric of each prompt `[prompt]` in float64, by run: `model`, `empty`, `circuit` and `complement`.
        settings: the arguments, but for model, inputs, `corrupted` and `statistics`, with which `measure_faithfulness`
            makes it again; of a metric of one's own its name.
        all_heads: how many the model has.
        origin: of which model, data, statistics and versions.
        resampling: how intervals are made.

    Its frame has one row a `quantity` (the four runs, `gap`, `faithfulness`, `completeness`): `value`, `low`, `high`,
    `unit`, `n` prompts, `metric`, `circuit` and `freeze_type`.
    """

    file_format = "circuitfreeze-faithfulness-1"
    file_title = "faithfulness"

    values: dict[str, Tensor]
    settings: dict[str, Any]
    all_heads: int
    origin: dict[str, str]
    resampling: Resampling

    def __post_init__(self) -> None:
        self.settings = self.settings | self.resampling.settings

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

    def records(self) -> list[dict[str, Any]]:
        """The rows of the frame."""
        told = {name: self.settings[name] for name in ("metric", "circuit", "freeze_type")}
        return [
            {"quantity": quantity, **estimate._asdict(), "unit": unit, "n": self.n, **told}
            for quantity, estimate, unit in self._rows
        ]

    def _tables(self) -> list[Table]:
        rows = [[MEANT[quantity], shown_with_interval(estimate), unit] for quantity, estimate, unit in self._rows]
        return [Table(["quantity", "value", "unit"], rows, self._caption())]

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
            f"prompts. {self.resampling.note('prompts')}."
        )

    def _parts(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        settings = self.settings | {"heads": list(self.settings["heads"].items())}  # JSON has no ints as keys
        facts = as_json({"settings": settings, "all_heads": self.all_heads, "origin": self.origin})
        return {f"values.{run}": rows for run, rows in self.values.items()}, facts

    @classmethod
    def _of_parts(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> Faithfulness:
        values = {run: tensors[f"values.{run}"] for run in RUNS}
        for run, rows in values.items():
            check_values(run, rows, len(values[RUNS[0]]))
        settings, all_heads = parsed(facts["settings"]), parsed(facts["all_heads"])
        resampling = Resampling.taken_from(settings)
        heads = {layer: list(map(int, of_layer)) for layer, of_layer in settings["heads"]}
        if len(values[RUNS[0]]) < 2 or not all(map(is_int, (all_heads, *heads))):
            raise ValueError("there must be at least two prompts, and heads by layer")
        for name in ("metric", "circuit", "freeze_type", "kv_scope"):
            check_type(name, settings[name], str, "a name")
        check_type("strength", settings["strength"], float, "a number")
        return cls(values, settings | {"heads": heads}, all_heads, provenance_in(facts), resampling)
