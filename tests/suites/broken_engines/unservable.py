"""Engines that serve what they cannot, or fail at it in their own way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from honest_engine import HookEngine, Layer
from torch import Tensor, nn

from freeze_core import InterventionConfig, InterventionError

Config = InterventionConfig


class CutsTheReference(HookEngine):
    """Holds as much of a reference as there is room for."""

    def reference(self, layer: Layer, role: str, x: Tensor, config: Config) -> Tensor:
        assert config.reference is not None
        value = self.for_heads(getattr(config.reference[layer.number], role), x)
        return value.repeat(len(x), 1, 1, 1)[: len(x), : x.shape[1]]


class IgnoresTheMask(HookEngine):
    """Holds a reference whatever it was padded like."""

    def padded_alike(self, x: Tensor, mask: Tensor | None) -> bool:
        return True


class CountsPaddingAlone(HookEngine):
    """Takes a reference that has as many padded positions in each row, wherever they are."""

    def padded_alike(self, x: Tensor, mask: Tensor | None) -> bool:
        ones = torch.ones(x.shape[:2], dtype=torch.long)
        own, held = (ones if one is None else one for one in (self.mask, mask))
        return bool((own.sum(1) == held.sum(1)).all())


class HoldsTheLastColumnWhenDecoding(HookEngine):
    """Holds the last recorded column in steps that go on behind the reference."""

    def reference(self, layer: Layer, role: str, x: Tensor, config: Config) -> Tensor:
        if not self.cached:
            return super().reference(layer, role, x, config)
        assert config.reference is not None
        return self.for_heads(getattr(config.reference[layer.number], role), x)[:, -1:]


class ResamplesPadding(HookEngine):
    """Takes padded positions for another row's, and the only row for its own."""

    def resample(self, x: Tensor, config: Config) -> Tensor:
        return x.roll(1, dims=0)


class ResamplesRightPadding(HookEngine):
    """Looks for padding in the first column alone, and so resamples padding on the right."""

    def resample(self, x: Tensor, config: Config) -> Tensor:
        kept = self.mask
        self.mask = None if kept is None else kept[:, :1]
        try:
            return super().resample(x, config)
        finally:
            self.mask = kept


class MeanOfAStep(HookEngine):
    """Takes a cached step's own statistics."""

    def remember_pass(self, model: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        super().remember_pass(model, args, kwargs)
        if self.cached:
            self.mask, self.cached = None, 0


class RefusesStepsOfOneTokenAlone(HookEngine):
    """Takes statistics of the pass in a step of several tokens, which sees a part of it."""

    def statistics(self, layer: Layer, role: str, x: Tensor, config: Config) -> tuple[Tensor, Tensor | float]:
        if config.statistics is None and x.shape[1] > 1:
            self.cached = 0
        return super().statistics(layer, role, x, config)


class TakesAnyStatistics(HookEngine):
    """Uses the statistics of any model."""

    def refuse_foreign_statistics(self, model: nn.Module, configs: list[Config]) -> None:
        pass


class FailsAnyhow(HookEngine):
    """Runs into whatever goes wrong."""

    def reference(self, layer: Layer, role: str, x: Tensor, config: Config) -> Tensor:
        assert config.reference is not None
        return self.for_heads(getattr(config.reference[layer.number], role), x) + torch.zeros_like(x)


class GivesNoReason(HookEngine):
    """Refuses without a word."""

    def resample(self, x: Tensor, config: Config) -> Tensor:
        try:
            return super().resample(x, config)
        except InterventionError:
            raise InterventionError("no") from None


class LeavesWhatItRefused(HookEngine):
    """Leaves its hooks in place after a pass that it refused."""

    refused = False

    def resample(self, x: Tensor, config: Config) -> Tensor:
        try:
            return super().resample(x, config)
        except InterventionError:
            self.refused = True
            raise

    def install(self, model: nn.Module) -> None:
        if not self.refused:
            super().install(model)


class RefusesAllCalibrated(HookEngine):
    """Refuses the pass that can be served, before the one that cannot."""

    def statistics(self, layer: Layer, role: str, x: Tensor, config: Config) -> tuple[Tensor, Tensor | float]:
        if config.statistics is None:
            raise InterventionError("statistics of the pass are never taken")
        return super().statistics(layer, role, x, replace(config))
