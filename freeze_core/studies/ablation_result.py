"""What an ablation study gives: sums of each sequence, and the table that is made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from freeze_core.config import InterventionConfig, config_of, parts_of
from freeze_core.files import Saved, as_json, check_values, parsed, under
from freeze_core.results.estimators import effect_size, mean, perplexity
from freeze_core.results.intervals import Estimate, Resampling
from freeze_core.results.provenance import provenance_in
from freeze_core.results.tables import Framed, Printed, Table, interval_columns, shown_with_interval
from freeze_core.studies.next_token import Sums

__all__ = ["CLEAN", "AblationStudy", "Row"]

CLEAN = "clean"
"""The name of the run without a freeze."""

HEADERS = ["circuit", "perplexity", "accuracy (%)", "KL to clean (nats/token)", "effect size (d)", "p", "p, adjusted"]


@dataclass(frozen=True)
class Row:
    """What freezing one circuit did, each number with its interval.

    Args:
        circuit: which, or `clean`.
        perplexity: exp of the mean loss over all targets.
        accuracy: share of the targets that were the likeliest token, 0 to 1.
        kl: mean divergence from the clean run's distribution, in nats a target.
        effect_size: Cohen's d of paired samples: over sequences, the mean change of the mean loss in units of that
            change's standard deviation; positive is worse. Of few sequences some draws hold one alone, whose deviation
            is 0: the interval then has an infinite end.
        p_value: of the paired test whether the mean change of the mean loss is 0.
        p_adjusted: the same, corrected for as many tests as the study has circuits.
    """

    circuit: str
    perplexity: Estimate
    accuracy: Estimate
    kl: Estimate
    effect_size: Estimate
    p_value: float
    p_adjusted: float


@dataclass(eq=False, repr=False)
class AblationStudy(Framed, Printed, Saved):
    """Measurements of an ablation study; the table is made of them when it is asked for, and the same each time.

    Args:
        config: what was frozen, circuit by circuit.
        sums: for `clean` and each circuit, sums of each sequence, `[sequence]`.
        targets: how many tokens each sequence had to predict `[sequence]`.
        origin: of which model, data and versions.
        resampling: how intervals and tests are made.
        heads: of each layer, where they were asked for so; `config` then names none.

    Its frame has one row a circuit: `circuit`; `perplexity`, `accuracy`, `kl` and `effect_size` with their `_low` and
    `_high`; `p_value`, `p_adjusted`, `clean_perplexity` and `clean_accuracy`, `n` sequences, `tokens` predicted, and
    `freeze_type`, `kv_scope` and `strength`.
    """

    file_format = "circuitfreeze-ablation-study-1"
    file_title = "ablation study"

    config: InterventionConfig
    sums: dict[str, Sums]
    targets: Tensor
    origin: dict[str, str]
    resampling: Resampling
    heads: dict[int, list[int]] | None = None

    @property
    def circuits(self) -> list[str]:
        """The frozen circuits, in the order in which they were asked for."""
        return [name for name in self.sums if name != CLEAN]

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments, but for model and data, with which `run_circuit_ablation_study` makes this study again."""
        taken = {"circuit", "backward_mode", "preserve_gradients", "layer_indices", "head_indices"}
        rest = {field.name: getattr(self.config, field.name) for field in fields(self.config)}
        return {
            "layers": self.config.layer_indices,
            "heads": self.config.head_indices if self.heads is None else self.heads,
            "circuits": self.circuits,
            **self.resampling.settings,
            **{name: value for name, value in rest.items() if name not in taken},
        }

    @cached_property
    def clean(self) -> Row:
        """Perplexity and accuracy of the unfrozen model, and no effect."""
        none = Estimate(0.0, 0.0, 0.0)
        return Row(CLEAN, *self._of(self.sums[CLEAN]), none, none, 1.0, 1.0)

    @cached_property
    def rows(self) -> list[Row]:
        """One row a circuit."""
        before = self.sums[CLEAN].loss / self.targets
        changes = {name: self.sums[name].loss / self.targets - before for name in self.circuits}
        probabilities = [self.resampling.paired_test(change) for change in changes.values()]
        adjusted = self.resampling.adjusted(probabilities)
        return [
            Row(
                name,
                *self._of(self.sums[name]),
                self.resampling.estimate(mean, self.sums[name].kl, self.targets),
                self.resampling.estimate(effect_size, changes[name]),
                probability,
                corrected,
            )
            for name, probability, corrected in zip(self.circuits, probabilities, adjusted, strict=True)
        ]

    def _of(self, sums: Sums) -> tuple[Estimate, Estimate]:
        return (
            self.resampling.estimate(perplexity, sums.loss, self.targets),
            self.resampling.estimate(mean, sums.correct, self.targets),
        )

    def records(self) -> list[dict[str, Any]]:
        """The rows of the frame."""
        return [self._record(row) for row in self.rows]

    def _record(self, row: Row) -> dict[str, Any]:
        record: dict[str, Any] = {"circuit": row.circuit}
        for name in ("perplexity", "accuracy", "kl", "effect_size"):
            record |= interval_columns(name, getattr(row, name))
        return record | {
            "p_value": row.p_value,
            "p_adjusted": row.p_adjusted,
            "clean_perplexity": self.clean.perplexity.value,
            "clean_accuracy": self.clean.accuracy.value,
            "n": len(self.targets),
            "tokens": int(self.targets.sum()),
            "freeze_type": str(self.config.freeze_type),
            "kv_scope": str(self.config.kv_scope),
            "strength": float(self.config.strength),
        }

    def _tables(self) -> list[Table]:
        rows = [
            [
                row.circuit,
                shown_with_interval(row.perplexity),
                shown_with_interval(row.accuracy, 100),
                shown_with_interval(row.kl),
                shown_with_interval(row.effect_size),
                f"{row.p_value:.2g}",
                f"{row.p_adjusted:.2g}",
            ]
            for row in (self.clean, *self.rows)
        ]
        rows[0][3:] = 4 * ["-"]  # the clean run is what the others are compared with
        return [Table(HEADERS, rows, self._caption())]

    def _caption(self) -> str:
        config = self.config
        where = f"{_named(config.layer_indices, 'layer')}, {_named(config.head_indices, 'query head')}"
        if self.heads is not None:
            where = ", ".join(f"layer {layer} {_named(heads, 'query head')}" for layer, heads in self.heads.items())
        return (
            f"{self.origin['model']}, {where}, each circuit frozen alone: {config.freeze_type}, strength "
            f"{config.strength:g}, kv_scope {config.kv_scope}. n = {len(self.targets)} sequences, "
            f"{int(self.targets.sum())} predicted tokens. {self.resampling.note('sequences')}; p of a paired sign-flip "
            "test of the mean loss, adjusted for all circuits (Benjamini-Yekutieli)."
        )

    def _parts(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        parts, config = parts_of(self.config)
        tensors = {f"config.{name}": tensor for name, tensor in parts.items()} | {"targets": self.targets}
        for circuit, sums in self.sums.items():
            tensors |= {f"sums.{circuit}.{name}": values for name, values in sums._asdict().items()}
        return tensors, as_json(
            {
                "config": config,
                "circuits": list(self.sums),
                "origin": self.origin,
                "resampling": self.resampling.settings,
                "heads": None if self.heads is None else list(self.heads.items()),
            }
        )

    @classmethod
    def _of_parts(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> AblationStudy:
        circuits, targets = parsed(facts["circuits"]), tensors["targets"]
        sums = {one: Sums(*(tensors[f"sums.{one}.{name}"] for name in Sums._fields)) for one in circuits}
        if circuits[:1] != [CLEAN] or len(sums) < max(2, len(circuits)):
            raise ValueError(f"of the runs {circuits}")
        if targets.dtype != torch.int64 or targets.dim() != 1 or len(targets) < 2 or int(targets.min()) < 1:
            raise ValueError("targets must be numbers of tokens, of at least two sequences")
        for circuit, of_circuit in sums.items():
            for name, values in of_circuit._asdict().items():
                check_values(f"{name} of {circuit}", values, len(targets))
        heads = parsed(facts.get("heads", "null"))  # files of earlier versions have none
        return cls(
            config_of(under("config", tensors), parsed(facts["config"])),
            sums,
            targets,
            provenance_in(facts),
            Resampling(**parsed(facts["resampling"])),
            None if heads is None else dict(heads),
        )


def _named(indices: Sequence[int] | None, what: str) -> str:
    if indices is None:
        return f"all {what}s"
    return f"{what}{'s' if len(indices) > 1 else ''} {', '.join(map(str, indices))}"
