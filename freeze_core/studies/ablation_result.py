"""What an ablation study gives: sums of each sequence, and the table that is made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from freeze_core.config import InterventionConfig, config_of, parts_of
from freeze_core.errors import InterventionError
from freeze_core.extras import extra
from freeze_core.files import parsed, read_file, write_file
from freeze_core.results.intervals import Estimate, Resampling
from freeze_core.results.tables import latex, markdown
from freeze_core.studies.measures import Sums
from freeze_core.studies.statistics import accuracy, effect_size, mean, perplexity

__all__ = ["CLEAN", "AblationStudy", "Row"]

CLEAN = "clean"
"""The name of the run without a freeze."""

FORMAT = "circuitfreeze-ablation-study-1"


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


class AblationStudy:
    """Measurements of an ablation study; the table is made of them when it is asked for, and the same each time.

    Args:
        config: what was frozen, circuit by circuit.
        sums: for `clean` and each circuit, sums of each sequence, `[sequence]`.
        targets: how many tokens each sequence had to predict `[sequence]`.
        origin: of which model, data and versions.
        resampling: how intervals and tests are made.
        heads: of each layer, where they were asked for so; `config` then names none.
    """

    def __init__(
        self,
        config: InterventionConfig,
        sums: Mapping[str, Sums],
        targets: Tensor,
        origin: Mapping[str, str],
        resampling: Resampling,
        heads: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        self.config = config
        self.sums = dict(sums)
        self.targets = targets
        self.origin = dict(origin)
        self.resampling = resampling
        self.heads = None if heads is None else {layer: list(several) for layer, several in heads.items()}

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
            self.resampling.estimate(accuracy, sums.correct, self.targets),
        )

    def to_frame(self) -> Any:
        """A tidy pandas `DataFrame`, one row a circuit; `n` sequences, `tokens` predicted, and `clean_` what was.

        Raises:
            ImportError: pandas is not installed.
        """
        pandas = extra("pandas", "to_frame makes a DataFrame; rows has the same numbers")
        return pandas.DataFrame([self._flat(row) for row in self.rows])

    def _flat(self, row: Row) -> dict[str, Any]:
        flat: dict[str, Any] = {"circuit": row.circuit}
        for name in ("perplexity", "accuracy", "kl", "effect_size"):
            value, low, high = getattr(row, name)
            flat |= {name: value, f"{name}_low": low, f"{name}_high": high}
        return flat | {
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

    def to_markdown(self) -> str:
        """The table with intervals and units, and a line that says of what it is."""
        return markdown(self)

    def to_latex(self) -> str:
        """The table with its caption as LaTeX, for the package booktabs."""
        return latex(self)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes all measurements, and what makes them again, to a safetensors file."""
        parts, config = parts_of(self.config)
        tensors = {f"config.{name}": tensor for name, tensor in parts.items()} | {"targets": self.targets}
        for circuit, sums in self.sums.items():
            tensors |= {f"sums.{circuit}.{name}": values for name, values in sums._asdict().items()}
        facts = {
            "config": config,
            "circuits": list(self.sums),
            "origin": self.origin,
            "resampling": self.resampling.settings,
            "heads": None if self.heads is None else list(self.heads.items()),
        }
        write_file(path, FORMAT, tensors, {name: json.dumps(fact) for name, fact in facts.items()})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> AblationStudy:
        """Reads what `save` wrote.

        Raises:
            InterventionError: the file is not there, or holds no study.
        """
        tensors, facts = read_file(path, FORMAT, "ablation study")
        try:
            parts = {name.removeprefix("config."): tensors[name] for name in tensors if name.startswith("config.")}
            circuits = parsed(facts["circuits"])
            sums = {one: Sums(*(tensors[f"sums.{one}.{name}"] for name in Sums._fields)) for one in circuits}
            _check(circuits, sums, tensors["targets"])
            config = config_of(parts, parsed(facts["config"]))
            origin, resampling = parsed(facts["origin"]), Resampling(**parsed(facts["resampling"]))
            heads = parsed(facts.get("heads", "null"))  # files of earlier versions have none
            origin = {"model": origin.pop("model"), **origin}
            return cls(config, sums, tensors["targets"], origin, resampling, None if heads is None else dict(heads))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InterventionError(f"ablation study of {path}: not what save writes ({error})") from error


def _check(circuits: list[str], sums: Mapping[str, Sums], targets: Tensor) -> None:
    """Raises `ValueError` for what no study has measured."""
    if circuits[:1] != [CLEAN] or len(sums) < max(2, len(circuits)):
        raise ValueError(f"of the runs {circuits}")
    if targets.dtype != torch.int64 or targets.dim() != 1 or len(targets) < 2 or int(targets.min()) < 1:
        raise ValueError("targets are no numbers of tokens of two sequences at least")
    for circuit, one in sums.items():
        for name, values in one._asdict().items():
            if values.dtype != torch.float64 or values.shape != targets.shape or not bool(values.isfinite().all()):
                raise ValueError(f"{name} of {circuit} is no finite number for each sequence")
