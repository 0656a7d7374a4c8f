"""Engines whose noise is not what it should be."""

from __future__ import annotations

import numpy as np
import torch
from honest_engine import HookEngine, Layer
from torch import Tensor

from freeze_core import InterventionConfig

Config = InterventionConfig


class UniformNoise(HookEngine):
    """Draws from a uniform distribution of the same mean and deviation."""

    def draw(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return generator.uniform(-(3**0.5), 3**0.5, shape)


class NarrowNoise(HookEngine):
    """Draws with a standard deviation of 0.9."""

    def draw(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return 0.9 * super().draw(generator, shape)


class OneDrawForAllHeads(HookEngine):
    """Gives all heads of an activation the same draw."""

    def draw(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return np.repeat(super().draw(generator, (shape[0], 1, shape[2])), shape[1], axis=1)


class OneDrawForAllColumns(HookEngine):
    """Gives all columns the same draw."""

    def draw(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return np.repeat(super().draw(generator, (1, *shape[1:])), shape[0], axis=0)


class OneDrawForAllLayers(HookEngine):
    """Forgets the layer when seeding."""

    def noise(self, layer: Layer, role: str, x: Tensor, config: Config) -> Tensor:
        return super().noise(Layer(0, layer.module, {}, layer.heads, layer.kv_heads), role, x, config)


class OneDrawForKAndV(HookEngine):
    """Draws values as it draws keys."""

    def noise(self, layer: Layer, role: str, x: Tensor, config: Config) -> Tensor:
        return super().noise(layer, "k" if role == "v" else role, x, config)


class ForgetsTheSeed(HookEngine):
    """Draws alike for every seed."""

    def noise(self, layer: Layer, role: str, x: Tensor, config: Config) -> Tensor:
        return super().noise(layer, role, x, Config(seed=0))


class NoiseOfTheRow(HookEngine):
    """Draws anew for each row of the batch."""

    def noise(self, layer: Layer, role: str, x: Tensor, config: Config) -> Tensor:
        rows = [super(NoiseOfTheRow, self).noise(layer, role, x, Config(seed=row)) for row in range(len(x))]
        return torch.stack(rows)


class NoiseOfTheLength(HookEngine):
    """Draws from the end of the prompt."""

    def noise(self, layer: Layer, role: str, x: Tensor, config: Config) -> Tensor:
        return super().noise(layer, role, x, config).flip(0)


class NoiseOfTheCircuit(HookEngine):
    """Draws otherwise when something else is frozen, too."""

    def noise(self, layer: Layer, role: str, x: Tensor, config: Config) -> Tensor:
        return super().noise(layer, role, x, Config(seed=config.seed + len(self.roles(config))))


class AddsUpLayerAndColumn(HookEngine):
    """Draws from the sum of seed, layer and column: what a layer has at a column, the next has one column before."""

    def noise(self, layer: Layer, role: str, x: Tensor, config: Config) -> Tensor:
        count = layer.heads if role == "q" else layer.kv_heads
        columns = range(self.cached, self.cached + x.shape[1])
        draws = [self.drawn(config.seed + layer.number + column, role, count, x.shape[-1]) for column in columns]
        return torch.from_numpy(np.stack(draws)).to(x).repeat_interleave(x.shape[2] // count, dim=1)

    def drawn(self, at: int, role: str, count: int, features: int) -> np.ndarray:
        generator = np.random.default_rng((abs(at), int(at < 0), "qkv".index(role)))
        return self.draw(generator, (count, features))


class NoiseComesRoundAgain(HookEngine):
    """Draws 16 columns, and repeats them."""

    def draw(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return super().draw(generator, (16, *shape[1:]))[np.arange(shape[0]) % 16]


class EverySecondHeadAlike(HookEngine):
    """Gives heads h and h + 2 the same draw."""

    def noise(self, layer: Layer, role: str, x: Tensor, config: Config) -> Tensor:
        e = super().noise(layer, role, x, config)
        return e[:, torch.arange(e.shape[1]) % 2] if role == "q" else e
