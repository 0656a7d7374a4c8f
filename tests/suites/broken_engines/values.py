"""Engines whose frozen values are wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from honest_engine import HookEngine, Layer
from torch import Tensor, nn

from freeze_core import InterventionConfig

Config = InterventionConfig


class MeanOverPadding(HookEngine):
    """Counts padded positions into the mean."""

    def samples(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1)


class SampleDeviation(HookEngine):
    """Takes the sample's standard deviation where the population's is due."""

    def replacement(self, layer: Layer, role: str, x: Tensor, config: Config) -> Tensor:
        if config.freeze_type != "noise":
            return super().replacement(layer, role, x, config)
        samples = self.samples(x.detach())
        deviation = samples.std(0, correction=min(1, len(samples) - 1))
        return samples.mean(0) + deviation * self.noise(layer, role, x, config)


class WholeAtAnyStrength(HookEngine):
    """Takes every strength for 1."""

    def blend(self, x: Tensor, r: Tensor, config: Config) -> Tensor:
        return super().blend(x, r, Config(strength=1.0, backward_mode=config.backward_mode))


class NextHead(HookEngine):
    """Freezes the head after the one that was asked for."""

    def heads(self, layer: Layer, role: str, config: Config, readers: int) -> list[int]:
        count = layer.heads // readers
        return sorted((head + 1) % count for head in super().heads(layer, role, config, readers))


class KeyForQuery(HookEngine):
    """Freezes keys when asked for queries."""

    def roles(self, config: Config) -> str:
        return super().roles(config).replace("q", "k") if config.circuit == "q" else super().roles(config)


class KeysWithValues(HookEngine):
    """Freezes keys along with values."""

    def roles(self, config: Config) -> str:
        return super().roles(config).replace("v", "kv")


class FirstOneWins(HookEngine):
    """Applies a list of freezes from its end."""

    def frozen(self, layer: Layer, role: str, x: Tensor, configs: list[Config], readers: int) -> Tensor:
        return super().frozen(layer, role, x, configs[::-1], readers)


class FreezesTheFrozen(HookEngine):
    """Takes what an earlier freeze left for the activation of the next."""

    def frozen(self, layer: Layer, role: str, x: Tensor, configs: list[Config], readers: int) -> Tensor:
        for config in configs:
            x = super().frozen(layer, role, x, [config], readers)
        return x


class RoundsOff(HookEngine):
    """Passes every activation of a frozen layer through bfloat16."""

    def frozen(self, layer: Layer, role: str, x: Tensor, configs: list[Config], readers: int) -> Tensor:
        return super().frozen(layer, role, x, configs, readers).bfloat16().to(x.dtype)


class NoStrengthIsLittle(HookEngine):
    """Installs strength 0 as a freeze of almost no strength."""

    @contextmanager
    def freeze(self, model: nn.Module, config: Any) -> Iterator[Callable[..., Any]]:
        with super().freeze(model, Config(**{**vars(config), "strength": 1e-3})) as frozen:
            yield frozen


class Multiplies(HookEngine):
    """Blends by products, which leaves nan where x is inf or nan."""

    def blend(self, x: Tensor, r: Tensor, config: Config) -> Tensor:
        return x * (1 - config.strength) + r * config.strength


class BlindUnderEager(HookEngine):
    """Does nothing under eager attention."""

    def frozen(self, layer: Layer, role: str, x: Tensor, configs: list[Config], readers: int) -> Tensor:
        eager = layer.module.config._attn_implementation == "eager"
        return x if eager else super().frozen(layer, role, x, configs, readers)


class SparesTheBias(HookEngine):
    """Replaces what a projection gives before its bias, and so leaves the bias in: a mean is the same, zero is not."""

    def replacement(self, layer: Layer, role: str, x: Tensor, config: Config) -> Tensor:
        value = super().replacement(layer, role, x, config)
        if config.freeze_type != "zero" and config.noise_std is None:
            return value
        name, features = layer.places[role]
        return value + self.for_heads(getattr(layer.module, name).bias.detach()[features], x)


class MeanOfEachRow(HookEngine):
    """Takes the mean over positions alone."""

    def statistics(self, layer: Layer, role: str, x: Tensor, config: Config) -> tuple[Tensor, Tensor | float]:
        mean, deviation = super().statistics(layer, role, x, config)
        return (mean if config.statistics else self.mean_over(x, 1)), deviation

    def mean_over(self, x: Tensor, axis: int) -> Tensor:
        real = (torch.ones(x.shape[:2]) if self.mask is None else self.mask)[..., None, None]
        return (x * real).sum(axis, keepdim=True) / real.sum(axis, keepdim=True).clamp_min(1)


class MeanOfEachColumn(MeanOfEachRow):
    """Takes the mean over rows alone."""

    def mean_over(self, x: Tensor, axis: int) -> Tensor:
        return super().mean_over(x, 0)


class MeanOfAllFeatures(HookEngine):
    """Takes the mean over a head's features, too."""

    def statistics(self, layer: Layer, role: str, x: Tensor, config: Config) -> tuple[Tensor, Tensor | float]:
        mean, deviation = super().statistics(layer, role, x, config)
        return mean.mean(-1, keepdim=True).expand_as(mean), deviation


class LeavesNanWhereCalibrated(HookEngine):
    """Blends by a sum where the replacement was recorded or calibrated: nan stays nan."""

    def blend(self, x: Tensor, r: Tensor, config: Config) -> Tensor:
        held = config.reference is not None or config.statistics is not None
        return super().blend(x, (x + (r - x)).detach() if held and config.strength == 1 else r, config)


class ZeroByDifference(HookEngine):
    """Makes zeros that gradients go straight through as x - x, which is nan where x is inf or nan."""

    def blend(self, x: Tensor, r: Tensor, config: Config) -> Tensor:
        straight = config.backward_mode == "ste" and config.freeze_type == "zero" and config.strength == 1
        return x - x.detach() if straight and torch.is_grad_enabled() else super().blend(x, r, config)


class ZeroDeviationIsNone(HookEngine):
    """Takes a noise_std of 0 for none."""

    def replacement(self, layer: Layer, role: str, x: Tensor, config: Config) -> Tensor:
        return super().replacement(layer, role, x, replace(config, noise_std=config.noise_std or None))
