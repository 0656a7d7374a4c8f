"""Engines that depend on how q, k and v are stored."""

from __future__ import annotations

from typing import Any

import torch
from honest_engine import HookEngine, Layer
from torch import Tensor

from freeze_core import InterventionConfig

Config = InterventionConfig


class CutsInThree(HookEngine):
    """Takes every fused projection to hold q, k and v one after the other."""

    def hook(self, layer: Layer, role: str, features: Tensor, configs: list[Config], wide: bool) -> Any:
        if layer.places["q"][0] == layer.places["v"][0]:
            size = features.shape[-1]
            start = {"q": 0, "k": layer.heads, "v": layer.heads + layer.kv_heads}[role] * size
            features = (start + torch.arange(features.numel())).view(-1, size)
        return super().hook(layer, role, features, configs, wide)


class CutsTheFusedGraph(HookEngine):
    """Lets no gradient through a fused projection."""

    def gradient_factor(self, config: Config) -> float:
        return self.factor

    factor = 0.0

    def install_layer(self, layer: Layer, configs: list[Config]) -> None:
        self.factor = 0.0 if layer.places["q"][0] == layer.places["v"][0] else 1.0
        super().install_layer(layer, configs)


class SwapsKeysAndValues(HookEngine):
    """Takes a fused projection to hold values where its keys are, and keys where its values are."""

    def hook(self, layer: Layer, role: str, features: Tensor, configs: list[Config], wide: bool) -> Any:
        if layer.places["q"][0] == layer.places["v"][0]:
            features = layer.places[{"q": "q", "k": "v", "v": "k"}[role]][1]
        return super().hook(layer, role, features, configs, wide)
