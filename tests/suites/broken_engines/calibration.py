"""Engines that take statistics of something else, or do not use those that they are given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from honest_engine import HookEngine, Layer
from torch import Tensor

from freeze_core import InterventionConfig
from freeze_core.statistics import ActivationStatistics, LayerStatistics
from pytest_circuitfreeze.recordings import Calibrated, calibrated
from pytest_circuitfreeze.strategies import Batch

Config = InterventionConfig


class IgnoresStatistics(HookEngine):
    """Takes statistics of the pass, whatever it is given."""

    def statistics(self, layer: Layer, role: str, x: Tensor, config: Config) -> tuple[Tensor, Tensor | float]:
        return super().statistics(layer, role, x, Config(freeze_type="mean"))


class IgnoresTheDeviation(HookEngine):
    """Scales noise by the deviation of the pass, around the given mean."""

    def statistics(self, layer: Layer, role: str, x: Tensor, config: Config) -> tuple[Tensor, Tensor | float]:
        mean, _ = super().statistics(layer, role, x, config)
        return mean, self.samples(x).std(0, correction=0)


class StatisticsOfTheLayerBefore(HookEngine):
    """Takes the statistics of the frozen layer before."""

    def statistics(self, layer: Layer, role: str, x: Tensor, config: Config) -> tuple[Tensor, Tensor | float]:
        known = [n for n in config.statistics or () if n < layer.number]
        return super().statistics(replace(layer, number=max(known, default=layer.number)), role, x, config)


class CalibratesOverPadding(HookEngine):
    """Counts padded positions in."""

    def calibrated(self, model: Any, sources: list[Batch], *more: Any) -> Calibrated:
        return Calibrated(calibrated(model, [Batch(source.input_ids) for source in sources], *more), sources)


class MeanOfMeans(HookEngine):
    """Gives each batch the same weight, however many tokens it has."""

    def calibrated(self, model: Any, sources: list[Batch], *more: Any) -> Calibrated:
        each, whole = [calibrated(model, [source], *more) for source in sources], calibrated(model, sources, *more)
        layers = {
            layer: LayerStatistics(
                {role: sum(one[layer].mean[role] for one in each) / len(each) for role in own.mean},
                own.std,
            )
            for layer, own in whole.items()
        }
        return Calibrated(ActivationStatistics(layers, whole.tokens, whole.identity), sources)


class SampleDeviationOfAll(HookEngine):
    """Keeps the sample's standard deviation where the population's is due."""

    def calibrated(self, model: Any, sources: list[Batch], *more: Any) -> Calibrated:
        whole = calibrated(model, sources, *more)
        factor = (whole.tokens / max(1, whole.tokens - 1)) ** 0.5
        layers = {
            layer: LayerStatistics(own.mean, {role: factor * std for role, std in own.std.items()})
            for layer, own in whole.items()
        }
        return Calibrated(ActivationStatistics(layers, whole.tokens, whole.identity), sources)
