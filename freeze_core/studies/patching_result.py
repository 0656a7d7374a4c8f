"""What a study of patches gives: the metric of each prompt under each patch, and the tables that are made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from freeze_core.arguments import check_choice, check_int
from freeze_core.files import Saved, as_json, check_values, parsed
from freeze_core.results.estimators import average, ratio
from freeze_core.results.intervals import Estimate, Estimates, Resampling
from freeze_core.results.provenance import provenance_in
from freeze_core.results.tables import Framed, Table, interval_columns, shown_with_interval, unit_of
from freeze_core.vocabulary import KVScope

__all__ = ["CELLS", "DIRECTIONS", "PatchingStudy"]

CELLS = ("head", "position")
DIRECTIONS = ("denoising", "noising")


@dataclass(eq=False, repr=False)
class PatchingStudy(Framed, Saved):
    """Measurements of a study of patches; tables are made of them when they are asked for, and the same each time.

    Args:
        values: the metric under each patch, by circuit `[layer, head, prompt]`, or `[layer, position, prompt]`, in
            float64; nan where nothing was patched.
        clean, corrupted: the metric of the runs as they are `[prompt]`.
        settings: the arguments, but for model and prompts, with which `patch_activations` makes this study again; of a
            metric of one's own its name.
        origin: of which model, data and versions.
        resampling: how intervals are made.

    Its frame has one row a patch: `circuit`, `layer`, `head` or `position`, `effect` and `normalised` with their `_low`
    and `_high`, `clean` and `corrupted` (the metric of the runs as they are), `gap` with its ends, `n` pairs of
    prompts, `metric`, `unit` (of all but `normalised`) and `direction`.
    """

    file_format = "circuitfreeze-patching-study-1"
    file_title = "patching study"

    values: dict[str, Tensor]
    clean: Tensor
    corrupted: Tensor
    settings: dict[str, Any]
    origin: dict[str, str]
    resampling: Resampling

    def __post_init__(self) -> None:
        self.settings = self.settings | self.resampling.settings

    @property
    def n(self) -> int:
        """How many pairs of prompts."""
        return len(self.clean)

    @property
    def baseline(self) -> Tensor:
        """The metric `[prompt]` of the run that is patched: `corrupted` under denoising, `clean` under noising."""
        return self.corrupted if self._denoises else self.clean

    @property
    def _denoises(self) -> bool:
        return bool(self.settings["direction"] == "denoising")

    @property
    def _gap(self) -> Tensor:
        return self.clean - self.corrupted if self._denoises else self.corrupted - self.clean

    @cached_property
    def gap(self) -> Estimate:
        """What there is to restore, or to break. The metric of the other run minus `baseline`, a mean over prompts."""
        return self.resampling.estimate(average, self._gap)

    @cached_property
    def effect(self) -> dict[str, Estimates]:
        """By circuit the metric patched minus `baseline`, means over prompts, with their ends: each `[layer, cell]`."""
        return {name: self._estimated(average, values) for name, values in self.values.items()}

    @cached_property
    def normalised(self) -> dict[str, Estimates]:
        """The same as a share of the gap between the runs, a ratio of means. 0 as `baseline`, 1 as the other run.

        In draws of prompts that have no gap the share is infinite, and so may an end of its interval be; where the
        interval of `gap` holds 0, shares are of nothing sure.
        """
        return {name: self._estimated(ratio, values, self._gap) for name, values in self.values.items()}

    def _estimated(self, statistic: Callable[..., Any], values: Tensor, *others: Tensor) -> Estimates:
        patched = ~values.isnan().any(-1)
        estimates = self.resampling.estimates(statistic, values[patched] - self.baseline, *others)
        tables = [torch.full(patched.shape, torch.nan, dtype=torch.float64) for _ in estimates]
        for table, found in zip(tables, estimates, strict=True):
            table[patched] = found
        return Estimates(*tables)

    def records(self) -> list[dict[str, Any]]:
        """The rows of the frame."""
        return [self._record(*cell) for cell in self._cells()]

    def _cells(self) -> list[tuple[str, int, int]]:
        return [
            (circuit, layer, cell)
            for circuit, values in self.values.items()
            for layer, cell in (~values.isnan().any(-1)).nonzero().tolist()
        ]

    def _record(self, circuit: str, layer: int, cell: int) -> dict[str, Any]:
        return {
            "circuit": circuit,
            "layer": layer,
            self.settings["by"]: cell,
            **interval_columns("effect", self._estimate("effect", circuit, layer, cell)),
            **interval_columns("normalised", self._estimate("normalised", circuit, layer, cell)),
            "clean": float(self.clean.mean()),
            "corrupted": float(self.corrupted.mean()),
            **interval_columns("gap", self.gap),
            "n": self.n,
            "metric": self.settings["metric"],
            "unit": unit_of(self.settings["metric"]),
            "direction": self.settings["direction"],
        }

    def _estimate(self, name: str, circuit: str, layer: int, cell: int) -> Estimate:
        tables: Estimates = getattr(self, name)[circuit]
        return Estimate(*(float(one[layer, cell]) for one in tables))

    def to_markdown(self, top: int | None = 10) -> str:
        """The `top` largest effects with intervals, or all, and a caption that says of what they are."""
        return self._table(top).markdown()

    def to_latex(self, top: int | None = 10) -> str:
        """The same with its caption as LaTeX, for the package booktabs."""
        return self._table(top).latex()

    def _table(self, top: int | None) -> Table:
        check_int("top", top, 1, optional=True)
        by, metric = self.settings["by"], self.settings["metric"]
        ordered = sorted(self._cells(), key=lambda cell: -abs(self._estimate("effect", *cell).value))
        rows = [
            [*map(str, cell), *(shown_with_interval(self._estimate(name, *cell)) for name in ("effect", "normalised"))]
            for cell in ordered[:top]
        ]
        headers = ["circuit", "layer", by, f"effect ({unit_of(metric)})", "normalised"]
        return Table(headers, rows, self._caption(len(rows), len(ordered)))

    def _caption(self, shown_ones: int, all_ones: int) -> str:
        settings = self.settings
        scope = f"; kv_scope {settings['kv_scope']}" if settings["by"] == "head" else ""
        runs = ("clean", "corrupted") if self._denoises else ("corrupted", "clean")
        which = (
            f"The {shown_ones} largest of {all_ones} effects" if shown_ones < all_ones else f"All {all_ones} effects"
        )
        return (
            f"{self.origin['model']}, activation patching by {settings['by']}, {settings['direction']}: the {runs[0]} "
            f"run into the {runs[1]} one, normalised so that 0 is {runs[1]} and 1 {runs[0]}"
            f"{scope}. {which} on {settings['metric']}, which is {float(self.clean.mean()):.3g} in the "
            f"clean and {float(self.corrupted.mean()):.3g} in the corrupted run, a gap of "
            f"{shown_with_interval(self.gap)}. n = {self.n} pairs of prompts. "
            f"{self.resampling.note('prompts')}, each by itself."
        )

    def _parts(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        values = {f"values.{name}": values for name, values in self.values.items()}
        facts = as_json({"settings": self.settings, "origin": self.origin})
        return values | {"clean": self.clean, "corrupted": self.corrupted}, facts

    @classmethod
    def _of_parts(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> PatchingStudy:
        settings, clean, corrupted = parsed(facts["settings"]), tensors["clean"], tensors["corrupted"]
        resampling = Resampling.taken_from(settings)
        values = {name: tensors[f"values.{name}"] for name in settings["circuits"]}
        check_values("clean", clean, None)
        check_values("corrupted", corrupted, len(clean))
        shape = values[settings["circuits"][0]].shape[:2]
        for name, of_circuit in values.items():
            check_values(name, of_circuit, *shape, len(clean), finite=False)
        if len(clean) < 2 or not isinstance(settings["metric"], str):
            raise ValueError("there must be at least two pairs of prompts, and the name of a metric")
        check_choice("by", settings["by"], CELLS)
        check_choice("direction", settings["direction"], DIRECTIONS)
        check_choice("kv_scope", settings["kv_scope"], KVScope)
        return cls(values, clean, corrupted, settings, provenance_in(facts), resampling)
