"""What adding a vector does to a metric, strength by strength, beside random vectors of the same length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from freeze_core.errors import InterventionError
from freeze_core.extras import extra
from freeze_core.generators import Generators
from freeze_core.inputs import logits_of, run
from freeze_core.scoring.batches import Batch
from freeze_core.scoring.metrics import Metric
from freeze_core.studies.intervals import Estimate, Resampling
from freeze_core.studies.tables import unit_of
from freeze_core.vectors.positions import Positions
from freeze_core.vectors.sites import ResidualSite
from freeze_core.vectors.steered import Addition, steer

__all__ = ["CONTROLS", "EffectRow", "SteeringEffects", "effects_of", "logits_at"]

CONTROLS = 8
"""Random vectors of the same length that a vector is compared with."""


@dataclass(frozen=True)
class EffectRow:
    """What adding a vector did at one strength, means over prompts with their intervals, in the metric's unit.

    Args:
        strength: times which the vector was added.
        change: of the metric, steered minus unsteered.
        control: the same of random vectors of the same length, of each prompt the mean over them.
        difference: of the two, prompt by prompt.
        control_largest: the mean change of that random vector whose mean change is largest in magnitude.
        p_value: of the paired test whether the mean difference is 0.
        p_adjusted: the same, corrected for as many tests as there are strengths.
    """

    strength: float
    change: Estimate
    control: Estimate
    difference: Estimate
    control_largest: float
    p_value: float
    p_adjusted: float


@dataclass(frozen=True, eq=False)
class SteeringEffects:
    """Measurements of a metric on prompts, without a vector and with it; the table is made of them when asked for.

    Args:
        metric: its name.
        positions: where the vector was added.
        strengths: times which it was added.
        clean: the metric of the unsteered model `[prompt]`.
        steered: with the vector `[strength, prompt]`.
        controls: with each random vector `[strength, control, prompt]`.
        resampling: how intervals and tests are made.
    """

    metric: str
    positions: str
    strengths: tuple[float, ...]
    clean: Tensor
    steered: Tensor
    controls: Tensor
    resampling: Resampling

    @cached_property
    def rows(self) -> list[EffectRow]:
        """One row a strength."""
        changes = self.steered - self.clean
        controls = (self.controls - self.clean).mean(1)
        largest = (self.controls - self.clean).mean(2)
        differences = changes - controls
        probabilities = [self.resampling.paired_test(one) for one in differences]
        adjusted = self.resampling.adjusted(probabilities)
        return [
            EffectRow(
                strength,
                self.resampling.estimate(_mean, changes[number]),
                self.resampling.estimate(_mean, controls[number]),
                self.resampling.estimate(_mean, differences[number]),
                float(largest[number][largest[number].abs().argmax()]),
                probabilities[number],
                adjusted[number],
            )
            for number, strength in enumerate(self.strengths)
        ]

    def to_frame(self) -> Any:
        """A tidy pandas `DataFrame`, one row a strength.

        Raises:
            ImportError: pandas is not installed.
        """
        pandas = extra("pandas", "to_frame makes a DataFrame; rows has the same numbers")
        return pandas.DataFrame(self.flat())

    def flat(self) -> list[dict[str, Any]]:
        """The rows of the frame: each number with its interval, and `n` prompts."""
        made = []
        for row in self.rows:
            flat: dict[str, Any] = {
                "strength": row.strength,
                "metric": self.metric,
                "unit": unit_of(self.metric),
                "clean": float(self.clean.mean()),
            }
            for name in ("change", "control", "difference"):
                value, low, high = getattr(row, name)
                flat |= {name: value, f"{name}_low": low, f"{name}_high": high}
            made.append(
                flat
                | {
                    "control_largest": row.control_largest,
                    "p_value": row.p_value,
                    "p_adjusted": row.p_adjusted,
                    "n": len(self.clean),
                    "controls": self.controls.shape[1],
                    "positions": self.positions,
                }
            )
        return made


def _mean(values: Any, axis: int) -> Any:
    return values.mean(axis)


def effects_of(
    model: nn.Module,
    site: ResidualSite,
    vector: Tensor,
    batches: Sequence[Batch],
    measure: Metric,
    strengths: Sequence[float],
    positions: Positions,
    seed: int,
    resampling: Resampling,
    progress: bool,
) -> SteeringEffects:
    """The effects of `vector` `[hidden]`, and of random ones that are drawn by `seed`."""
    vectors = {"vector": vector} | {
        f"random vector {number}": one for number, one in enumerate(_random_vectors(vector, seed))
    }
    clean, rows = _measured(model, site, vectors, batches, measure, strengths, positions, progress)
    steered = rows.pop("vector")
    controls = torch.stack(list(rows.values()), dim=1)
    return SteeringEffects(measure.name, str(positions), tuple(strengths), clean, steered, controls, resampling)


def _random_vectors(vector: Tensor, seed: int) -> Tensor:
    """Vectors of the length of `vector` in directions drawn evenly, `[control, hidden]`."""
    drawn = torch.randn(CONTROLS, len(vector), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scaled: Tensor = drawn * (vector.double().norm() / drawn.norm(dim=1, keepdim=True))
    return scaled.to(vector.dtype)


def _measured(
    model: nn.Module,
    site: ResidualSite,
    vectors: Mapping[str, Tensor],
    batches: Sequence[Batch],
    measure: Metric,
    strengths: Sequence[float],
    positions: Positions,
    progress: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The metric of each prompt without a vector `[prompt]`, and with each at each strength `[strength, prompt]`.

    All passes over a batch draw the same dropout; torch's generators are put back.
    """
    generators = Generators(model)
    before = generators.states()
    found: dict[str, list[list[Tensor]]] = {name: [[] for _ in strengths] for name in vectors}
    unsteered = []
    total = len(batches) * (1 + len(vectors) * len(strengths))
    try:
        with torch.no_grad(), tqdm(total=total, desc="steering", unit="pass", disable=not progress) as bar:
            for number, batch in enumerate(batches):
                start = generators.states()
                clean = logits_at(model, batch)
                after = generators.states()
                unsteered.append(measure.rows(number, batch, clean, clean, "unsteered"))
                bar.update()
                for name, vector in vectors.items():
                    for place, strength in enumerate(strengths):
                        generators.put(start)
                        delta = None if strength == 0 else strength * vector
                        with steer(site, Addition(delta, positions, name), "ignore"):
                            logits = logits_at(model, batch)
                        what = f"{name}, at strength {strength:g}"
                        found[name][place].append(measure.rows(number, batch, logits, clean, what))
                        bar.update()
                generators.put(after)
    finally:
        generators.put(before)
    whole = {name: torch.stack([torch.cat(one) for one in several]) for name, several in found.items()}
    clean_rows = torch.cat(unsteered)
    for name, values in {"unsteered": clean_rows, **whole}.items():
        if not bool(values.isfinite().all()):
            raise InterventionError(
                f"metric={measure.name} is not finite for some prompt, {name}: there is no mean of it; leave the "
                "prompt out, add less of the vector, or run in a wider dtype"
            )
    return clean_rows, whole


def logits_at(model: nn.Module, batch: Batch) -> Tensor:
    """The logits at a batch's positions `[row, position, word]`."""
    logits = logits_of(run(model, batch.arguments))
    if logits.dim() != 3 or logits.shape[:2] != (batch.rows, batch.columns):
        raise InterventionError(
            f"{type(model).__name__} gave logits {list(logits.shape)} for {[batch.rows, batch.columns]} [batch, "
            "token]: they must be of every token (no logits_to_keep=)"
        )
    return batch.at_positions(logits)
