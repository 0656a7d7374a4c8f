"""What adding a vector does to a metric, strength by strength, beside random vectors of the same length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from freeze_core.freezing.install import FrozenCircuits
from freeze_core.results.estimators import average
from freeze_core.results.intervals import Estimate, Resampling
from freeze_core.results.tables import Framed, interval_columns, unit_of
from freeze_core.runs.measuring import measure, rows_of
from freeze_core.scoring.batches import Batch
from freeze_core.scoring.metrics import Metric
from freeze_core.vectors.positions import Positions
from freeze_core.vectors.sites import ResidualSite
from freeze_core.vectors.steered import Addition, steer

__all__ = ["CONTROLS", "EffectRow", "SteeringEffects", "effects_of"]

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
class SteeringEffects(Framed):
    """Measurements of a metric on prompts, without a vector and with it; the table is made of them when asked for.

    Args:
        metric: its name.
        positions: where the vector was added.
        strengths: times which it was added.
        clean: the metric of the unsteered model `[prompt]`.
        steered: with the vector `[strength, prompt]`.
        controls: with each random vector `[strength, control, prompt]`.
        resampling: how intervals and tests are made.

    Its frame has one row a `strength`: `metric`, `unit`, `clean`, `change`, `control` and `difference` with their
    `_low` and `_high`, `control_largest`, `p_value`, `p_adjusted`, `n` prompts, how many `controls`, and `positions`.
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
                self.resampling.estimate(average, changes[number]),
                self.resampling.estimate(average, controls[number]),
                self.resampling.estimate(average, differences[number]),
                float(largest[number][largest[number].abs().argmax()]),
                probabilities[number],
                adjusted[number],
            )
            for number, strength in enumerate(self.strengths)
        ]

    def records(self) -> list[dict[str, Any]]:
        """The rows of the frame."""
        return [
            {
                "strength": row.strength,
                "metric": self.metric,
                "unit": unit_of(self.metric),
                "clean": float(self.clean.mean()),
                **interval_columns("change", row.change),
                **interval_columns("control", row.control),
                **interval_columns("difference", row.difference),
                "control_largest": row.control_largest,
                "p_value": row.p_value,
                "p_adjusted": row.p_adjusted,
                "n": len(self.clean),
                "controls": self.controls.shape[1],
                "positions": self.positions,
            }
            for row in self.rows
        ]


def effects_of(
    model: nn.Module,
    site: ResidualSite,
    vector: Tensor,
    batches: Sequence[Batch],
    metric: Metric,
    strengths: Sequence[float],
    positions: Positions,
    seed: int,
    resampling: Resampling,
    progress: bool,
) -> SteeringEffects:
    """The effects of `vector` `[hidden]`, and of random ones that are drawn by `seed`."""
    controls = [f"random vector {number}" for number in range(CONTROLS)]
    vectors = {"vector": vector, **dict(zip(controls, _random_vectors(vector, seed), strict=True))}
    runs = {
        f"{name}, at strength {strength}": partial(_steered, site, positions, name, one, strength)
        for name, one in vectors.items()
        for strength in strengths
    }
    measured = measure(model, batches, "unsteered", runs, rows_of(metric), task="steering", progress=progress)
    rows = [values[metric.name] for values in measured.values()]
    table = torch.stack(rows[1:]).view(len(vectors), len(strengths), -1)
    return SteeringEffects(
        metric.name, str(positions), tuple(strengths), rows[0], table[0], table[1:].transpose(0, 1), resampling
    )


def _steered(
    site: ResidualSite, positions: Positions, name: str, vector: Tensor, strength: float, number: int
) -> FrozenCircuits:
    delta = None if strength == 0 else strength * vector
    return steer(site, Addition(delta, positions, name), "ignore")


def _random_vectors(vector: Tensor, seed: int) -> Tensor:
    """Vectors of the length of `vector` in directions drawn evenly, `[control, hidden]`."""
    drawn = torch.randn(CONTROLS, len(vector), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scaled: Tensor = drawn * (vector.double().norm() / drawn.norm(dim=1, keepdim=True))
    return scaled.to(vector.dtype)
