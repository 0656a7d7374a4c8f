"""Engines that take statistics of something else, or do not use those that they are given."""

from __future__ import annotations

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
    """Takes the statistics of the layer before."""

    def statistics(self, layer: Layer, role: str, x: Tensor, config: Config) -> tuple[Tensor, Tensor | float]:
        before = Layer(layer.number - 1, layer.module, layer.places, layer.heads, layer.kv_heads)
        return super().statistics(layer if config.statistics is None else before, role, x, config)


class CalibratesOverPadding(HookEngine):
    """Counts padded positions in."""

    def calibrated(self, model: Any, sources: list[Batch]) -> Calibrated:
        return Calibrated(calibrated(model, [Batch(source.input_ids) for source in sources]), sources)


class MeanOfMeans(HookEngine):
    """Gives each batch the same weight, however many tokens it has."""

    def calibrated(self, model: Any, sources: list[Batch]) -> Calibrated:
        each, whole = [calibrated(model, [source]) for source in sources], calibrated(model, sources)
        layers = {
            layer: LayerStatistics(
                {role: sum(one[layer].mean[role] for one in each) / len(each) for role in own.mean},  # type: ignore
                own.std,
            )
            for layer, own in whole.items()
        }
        return Calibrated(ActivationStatistics(layers, whole.tokens, whole.identity), sources)


class SampleDeviationOfAll(HookEngine):
    """Keeps the sample's standard deviation where the population's is due."""

    def calibrated(self, model: Any, sources: list[Batch]) -> Calibrated:
        whole = calibrated(model, sources)
        factor = (whole.tokens / (whole.tokens - 1)) ** 0.5
        layers = {
            layer: LayerStatistics(own.mean, {role: factor * std for role, std in own.std.items()})
            for layer, own in whole.items()
        }
        return Calibrated(ActivationStatistics(layers, whole.tokens, whole.identity), sources)
