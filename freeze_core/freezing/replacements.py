"""The value `r` that takes an activation's place: one class for each freeze type.

A new freeze type is an entry in `FreezeType` and a class here. The class says which fields of a config it reads
(`from_config`), what decides its value (`key`), what it needs of the pass, and what its value is. Activations are
`[batch, token, feature]`; a replacement broadcasts to that and carries no gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from freeze_core.freezing.compile_checks import require
from freeze_core.freezing.draws import NoiseTable, accumulation_dtype, derangement
from freeze_core.freezing.module_features import ModuleFeatures
from freeze_core.freezing.passes import Pass
from freeze_core.ordinary import ordinary_tensors
from freeze_core.vocabulary import FreezeType, Role

if TYPE_CHECKING:
    from freeze_core.config import InterventionConfig
    from freeze_core.statistics import LayerStatistics

__all__ = ["REPLACEMENTS", "Reference", "Replacement", "Value", "Zero"]

Value = Callable[[Tensor, Pass], Tensor]
"""The replacement in one module: takes its activation `x` `[batch, token, feature]`, detached, and the running pass."""


@dataclass(frozen=True)
class Reference:
    """A layer's recorded activations by role, and the padding masks `[batch, token]` they were recorded under.

    Copies: a live freeze does not change when the recording is written to.
    """

    activations: Mapping[Role, Tensor] = field(compare=False)
    masks: Mapping[Role, Tensor | None] = field(compare=False)
    digest: str


class Replacement(ABC):
    """What one freeze type puts in an activation's place; equal where the values are equal."""

    freeze_type: ClassVar[FreezeType]
    constant: ClassVar[Tensor | None] = None
    """The value, where it depends on nothing: such a layer may also be run outside of a pass."""
    reads_other_rows: ClassVar[bool] = False
    """Whether a row's value comes from another row, so that rows must keep their places between passes."""
    seed: int = 0
    noise_std: float | None = None
    statistics: LayerStatistics | None = None
    reference: Reference | None = None

    @classmethod
    def from_config(
        cls, config: InterventionConfig, statistics: LayerStatistics | None, reference: Reference | None
    ) -> Replacement:
        """The replacement in one layer, of which the statistics and the recording are given, if the config has any."""
        return cls()

    @property
    def key(self) -> str:
        """What decides the value, as text: caches and saved progress are compared by it."""
        statistics = self.statistics.digest() if self.statistics else ""
        # Cross-attention under a reference reads keys and values from a cache, so that recordings must be told apart.
        recorded = self.reference.digest if self.reference else ""
        return f"{self.seed:x} {self.noise_std} {statistics} {recorded}"

    @property
    def differs_by_run(self) -> bool:
        """Whether a layer that a pass runs several times has a value of its own in each run."""
        return self.reference is not None or self.statistics is not None

    @abstractmethod
    def in_module(self, features: ModuleFeatures) -> Value:
        """The value in the module that holds these features; what can be prepared before a pass is prepared here."""


with ordinary_tensors():
    ZERO = torch.zeros(())


@dataclass(frozen=True)
class Zero(Replacement):
    """Zero: a number, and so of any dtype and device."""

    freeze_type = FreezeType.ZERO
    constant = ZERO

    def in_module(self, features: ModuleFeatures) -> Value:
        return lambda x, running: ZERO


@dataclass(frozen=True)
class Mean(Replacement):
    """Each feature's mean, over the real tokens of the pass or calibrated."""

    freeze_type = FreezeType.MEAN
    statistics: LayerStatistics | None = None

    @classmethod
    def from_config(
        cls, config: InterventionConfig, statistics: LayerStatistics | None, reference: Reference | None
    ) -> Mean:
        return cls(statistics)

    def in_module(self, features: ModuleFeatures) -> Value:
        return lambda x, running: _mean_and_deviation(self, features, x, running)[0]


@dataclass(frozen=True)
class Noise(Replacement):
    """Normal draws: of deviation `noise_std` around 0, or with each feature's mean and deviation."""

    freeze_type = FreezeType.NOISE
    seed: int = 0
    noise_std: float | None = None
    statistics: LayerStatistics | None = None

    @classmethod
    def from_config(
        cls, config: InterventionConfig, statistics: LayerStatistics | None, reference: Reference | None
    ) -> Noise:
        if config.noise_std is not None:
            return cls(int(config.seed), float(config.noise_std))
        return cls(int(config.seed), statistics=statistics)

    def in_module(self, features: ModuleFeatures) -> Value:
        return partial(self._drawn, features, features.noise_tables(self.seed))

    def _drawn(self, features: ModuleFeatures, tables: Mapping[Role, NoiseTable], x: Tensor, running: Pass) -> Tensor:
        if self.noise_std is None:
            mean, deviation = _mean_and_deviation(self, features, x, running)
        tokens = x.shape[1]
        start = running.column(tokens)
        normals = features.lay_out({role: table.columns(start, tokens, x) for role, table in tables.items()}, x)
        return mean + deviation * normals if self.noise_std is None else self.noise_std * normals


@dataclass(frozen=True)
class Recorded(Replacement):
    """What was recorded on another input, of the same length and padding."""

    freeze_type = FreezeType.REFERENCE
    reference: Reference

    @classmethod
    def from_config(
        cls, config: InterventionConfig, statistics: LayerStatistics | None, reference: Reference | None
    ) -> Recorded:
        assert reference is not None, "a config of this type has a recording"
        return cls(reference)

    def in_module(self, features: ModuleFeatures) -> Value:
        return partial(self._recorded, features)

    def _recorded(self, features: ModuleFeatures, x: Tensor, running: Pass) -> Tensor:
        reference = self.reference
        roles = set(features.roles) & reference.activations.keys()
        recorded = {
            role: running.of_this_run(reference.activations[role], 4, "the reference was recorded of") for role in roles
        }
        for role, value in recorded.items():
            if running.cached or value.shape[1] != x.shape[1] or value.shape[0] not in (1, x.shape[0]):
                return require(
                    x,
                    False,
                    f"the reference's {role} is {list(value.shape)} [batch, token, head, head_dim], this pass has "
                    f"{list(x.shape[:2])} [batch, token] after {running.cached} cached tokens: a reference serves a "
                    "whole pass of its own length, and of its own batch or any if it has one row",
                )
        mask = next(reference.masks[role] for role in roles)  # a module's roles are of the same tokens
        return running.padded_alike(features.lay_out(recorded, x), mask)


@dataclass(frozen=True)
class Resample(Replacement):
    """The same column of another row, by a permutation without a fixed point."""

    freeze_type = FreezeType.RESAMPLE
    reads_other_rows = True
    seed: int = 0

    @classmethod
    def from_config(
        cls, config: InterventionConfig, statistics: LayerStatistics | None, reference: Reference | None
    ) -> Resample:
        return cls(int(config.seed))

    def in_module(self, features: ModuleFeatures) -> Value:
        return lambda x, running: running.without_padding(x)[derangement(self.seed, len(x))]


REPLACEMENTS: Mapping[FreezeType, type[Replacement]] = {
    kind.freeze_type: kind for kind in (Zero, Mean, Noise, Recorded, Resample)
}


def _mean_and_deviation(
    replacement: Replacement, features: ModuleFeatures, x: Tensor, running: Pass
) -> tuple[Tensor, Tensor]:
    """Each feature's mean and standard deviation `[feature]`: calibrated, or of the real tokens of this pass."""
    calibrated = replacement.statistics
    if calibrated is not None:
        mean, std = (
            {role: running.of_this_run(values[role], 2, "the statistics are of") for role in values}
            for values in (calibrated.mean, calibrated.std)
        )
        return features.lay_out(mean, x), features.lay_out(std, x)
    x = require(
        x,
        running.cached == 0,
        f"freeze_type '{replacement.freeze_type}' takes its statistics from the pass, and this pass goes on "
        f"after {running.cached} cached tokens that it does not see: run without a cache (use_cache=False), "
        "freeze with calibrated statistics=, or with zero or noise_std",
    )
    return statistics_of(*running.real(x))


def statistics_of(x: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each feature's mean and population standard deviation over batch and real positions.

    Args:
        x: activation `[batch, token, feature]`.
        real: `[batch, token]` bool, true where a token is not padding; `None` is everywhere.

    Returns:
        mean and standard deviation `[feature]`, in float32, or float64 for float64.
    """
    x = x.detach().to(accumulation_dtype(x.dtype))
    if real is None:
        mean = x.mean(dim=(0, 1))
        return mean, (x - mean).square().mean(dim=(0, 1)).sqrt()
    # Chosen, not cut out: a compiled pass cannot know how many are real. Nor multiplied: padding may hold inf or nan.
    counted = real.to(x.device)[..., None]
    count = counted.sum()
    x = require(
        x, count > 0, "attention_mask leaves no real token in this pass: there is nothing to take statistics of"
    )
    mean = torch.where(counted, x, 0).sum(dim=(0, 1)) / count
    return mean, (torch.where(counted, x - mean, 0).square().sum(dim=(0, 1)) / count).sqrt()
