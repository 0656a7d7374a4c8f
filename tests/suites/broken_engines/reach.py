"""Engines that reach other heads, layers, positions or rows than they should."""

from __future__ import annotations

import torch
from honest_engine import HookEngine, Layer
from torch import Tensor

from freeze_core import InterventionConfig

Config = InterventionConfig


class TouchesEverything(HookEngine):
    """Moves every activation of a frozen layer by one unit in the last place."""

    def frozen(self, layer: Layer, role: str, x: Tensor, configs: list[Config], readers: int) -> Tensor:
        return torch.nextafter(super().frozen(layer, role, x, configs, readers), torch.tensor(torch.inf))


class OVFollowsQK(HookEngine):
    """Freezes values of a layer to zero, whatever is asked, where its queries were frozen before."""

    def frozen(self, layer: Layer, role: str, x: Tensor, configs: list[Config], readers: int) -> Tensor:
        frozen = super().frozen(layer, role, x, configs, readers)
        return frozen * 0 if role == "v" and configs[0].circuit == "qk" and len(configs) > 1 else frozen


class GroupForHead(HookEngine):
    """Freezes the whole group when asked for a head of it."""

    def heads(self, layer: Layer, role: str, config: Config, readers: int) -> list[int]:
        return super().heads(layer, role, Config(head_indices=config.head_indices), readers)


class HeadsInTurn(HookEngine):
    """Takes query head h to read KV head h modulo their number."""

    def heads(self, layer: Layer, role: str, config: Config, readers: int) -> list[int]:
        if role == "q" or readers == 1:
            return super().heads(layer, role, config, readers)
        return sorted({head % layer.kv_heads for head in config.head_indices or ()})


class LayerBefore(HookEngine):
    """Freezes the layer before, too."""

    def in_layer(self, config: Config, layer: Layer) -> bool:
        return any(layer.number in (wanted, wanted - 1) for wanted in config.layer_indices or ())


class LooksAhead(HookEngine):
    """Replaces by a trace of the last token."""

    def replacement(self, layer: Layer, role: str, x: Tensor, config: Config) -> Tensor:
        return super().replacement(layer, role, x, config) + 1e-3 * x[:, -1:].detach()


class LooksAcross(HookEngine):
    """Replaces by a trace of the first row."""

    def replacement(self, layer: Layer, role: str, x: Tensor, config: Config) -> Tensor:
        return super().replacement(layer, role, x, config) + 1e-3 * x[:1].detach()
