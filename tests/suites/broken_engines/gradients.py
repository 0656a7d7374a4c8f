"""Engines whose gradients are not those of the estimators."""

from __future__ import annotations

from typing import Any

import torch
from honest_engine import Blend, HookEngine, Layer
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


class CircuitIsStraightThrough(HookEngine):
    """Takes the gradient of the circuit left untouched for that of a frozen one, straight through."""

    def run_twice(self, layer: Layer) -> None:
        pass

    def gradient_factor(self, config: Config) -> float:
        return 1.0 if config.backward_mode == "circuit_ste" else super().gradient_factor(config)


class CircuitStops(HookEngine):
    """Stops the gradient where that of the circuit left untouched should flow."""

    def run_twice(self, layer: Layer) -> None:
        pass


class LeaksThePattern(HookEngine):
    """Leaves values untouched for the gradient, but queries and keys frozen."""

    def is_spared(self, role: str, config: Config) -> bool:
        return super().is_spared(role, config) and role == "v"


class SparesEverything(HookEngine):
    """Leaves all freezes out for the gradient, where one asks for it."""

    def is_spared(self, role: str, config: Config) -> bool:
        return True


class NotFrozenWhileTraining(HookEngine):
    """Runs the circuit left untouched forwards, too, while gradients are kept."""

    def run_twice(self, layer: Layer) -> None:
        module, forward = layer.module, layer.module.forward

        def untouched(*args: Any, **kwargs: Any) -> Any:
            self.sparing = torch.is_grad_enabled()
            try:
                return forward(*args, **kwargs)
            finally:
                self.sparing = False

        module.forward = untouched
        self.undo.append(lambda: delattr(module, "forward"))


class ScalesStraightThrough(HookEngine):
    """Lets as much of the gradient straight through as there is strength."""

    def gradient_factor(self, config: Config) -> float:
        return config.strength if config.backward_mode == "ste" else super().gradient_factor(config)


class StillBlend(Blend):
    """Passes the gradient on, and no tangent."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return torch.zeros_like(tangent)


class LosesTangents(HookEngine):
    """Has the right gradients in reverse mode, and none of frozen projections in forward mode."""

    def blend(self, x: Tensor, r: Tensor, config: Config) -> Tensor:
        value = super().blend(x, r, config).detach()
        blended: Tensor = StillBlend.apply(x, value, self.gradient_factor(config))  # type: ignore[no-untyped-call]
        return blended
