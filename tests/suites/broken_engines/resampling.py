"""Engines that do not resample as they should."""

from __future__ import annotations

from typing import Any

import torch
from honest_engine import HookEngine
from torch import Tensor, nn

from freeze_core import InterventionConfig

Config = InterventionConfig


class KeepsItsOwnRow(HookEngine):
    """Shuffles rows, but leaves the first where it is."""

    def rows(self, seed: int, count: int) -> Tensor:
        return torch.arange(count).roll(1) if count == 2 else torch.tensor([0, *range(2, count), 1])


class TakesOneRowTwice(HookEngine):
    """Gives the first row to all others."""

    def rows(self, seed: int, count: int) -> Tensor:
        return torch.tensor([1, *[0] * (count - 1)])


class TakesTheColumnBefore(HookEngine):
    """Takes another row's activation of the position before."""

    def resample(self, x: Tensor, config: Config) -> Tensor:
        return super().resample(x, config).roll(1, dims=1)


class AveragesTheOthers(HookEngine):
    """Takes the mean of all other rows."""

    def resample(self, x: Tensor, config: Config) -> Tensor:
        return (x.sum(0) - x) / (len(x) - 1)


class ShufflesAnew(HookEngine):
    """Takes other rows on every pass, drawn from no seed."""

    passes = 0

    def install(self, model: nn.Module) -> None:
        super().install(model)
        self.passes = 0

    def remember_pass(self, model: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        super().remember_pass(model, args, kwargs)
        self.passes += 1

    def rows(self, seed: int, count: int) -> Tensor:
        return super().rows(seed + self.passes, count)


class ResamplesAnewAtEachStep(HookEngine):
    """Takes other rows in a step than in the prompt."""

    def rows(self, seed: int, count: int) -> Tensor:
        return super().rows(seed + self.cached, count)


class RowsOfTheTokens(HookEngine):
    """Takes other rows where there are more tokens."""

    def resample(self, x: Tensor, config: Config) -> Tensor:
        return x[self.rows(config.seed + x.shape[1] // 6, len(x))]
