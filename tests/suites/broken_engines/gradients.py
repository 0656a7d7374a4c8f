"""Engines whose gradients are not those of the estimators."""

from __future__ import annotations

from honest_engine import HookEngine, Layer
from torch import Tensor

from freeze_core import InterventionConfig

Config = InterventionConfig


class AlwaysStops(HookEngine):
    """Stops the gradient where it should go straight through."""

    def gradient_factor(self, config: Config) -> float:
        return 1.0 - config.strength


class NeverStops(HookEngine):
    """Lets the gradient straight through where it should stop."""

    def gradient_factor(self, config: Config) -> float:
        return 1.0


class StopsAtAnyStrength(HookEngine):
    """Stops the gradient altogether where a part of it should pass."""

    def gradient_factor(self, config: Config) -> float:
        return 1.0 if config.backward_mode == "ste" else 0.0


class StopsAlmost(HookEngine):
    """Lets a millionth of the gradient through where none should pass."""

    def gradient_factor(self, config: Config) -> float:
        return 1.0 if config.backward_mode == "ste" else 1.0 - config.strength + 1e-6


class MeanCarriesGradient(HookEngine):
    """Lets gradient flow into the mean."""

    def replacement(self, layer: Layer, role: str, x: Tensor, config: Config) -> Tensor:
        return self.samples(x).mean(0) if config.freeze_type == "mean" else super().replacement(layer, role, x, config)

    def blend(self, x: Tensor, r: Tensor, config: Config) -> Tensor:
        return (1 - config.strength) * x + config.strength * r


class LosesParameters(HookEngine):
    """Cuts frozen layers out of the graph, so that their weights have no gradient at all."""

    def frozen(self, layer: Layer, role: str, x: Tensor, configs: list[Config], readers: int) -> Tensor:
        return super().frozen(layer, role, x, configs, readers).detach()
