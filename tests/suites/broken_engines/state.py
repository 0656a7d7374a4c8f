"""Engines that lay hands on what is not their own."""

from __future__ import annotations

from typing import Any

import torch
from honest_engine import HookEngine, Layer
from torch import Tensor, nn

from freeze_core import InterventionConfig

Config = InterventionConfig


class ZeroesWeights(HookEngine):
    """Freezes to zero by zeroing a parameter while it is on."""

    def install_layer(self, layer: Layer, configs: list[Config]) -> None:
        super().install_layer(layer, configs)
        parameter = next(layer.module.parameters())
        saved = parameter.detach().clone()
        parameter.data.zero_()
        self.undo.append(lambda: parameter.data.copy_(saved))


class SwitchesToEval(HookEngine):
    """Puts frozen layers into eval mode."""

    def install_layer(self, layer: Layer, configs: list[Config]) -> None:
        super().install_layer(layer, configs)
        layer.module.eval()


class DrawsFromTorch(HookEngine):
    """Draws noise from torch's own generator."""

    def noise(self, layer: Layer, role: str, x: Tensor, config: Config) -> Tensor:
        return torch.randn_like(x[0])


class SeedsTorch(HookEngine):
    """Draws from torch's generator after seeding it, and so alike, but not without a trace."""

    def noise(self, layer: Layer, role: str, x: Tensor, config: Config) -> Tensor:
        torch.manual_seed(config.seed)
        return torch.randn_like(x[0])


class WritesToItsInput(HookEngine):
    """Centres the layer's input in place."""

    def install_layer(self, layer: Layer, configs: list[Config]) -> None:
        super().install_layer(layer, configs)
        if any(self.in_layer(config, layer) for config in configs):
            name, _ = layer.places["q"]
            module = getattr(layer.module, name)
            self.undo.append(module.register_forward_pre_hook(self.write).remove)

    def write(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].add_(1.0)


class WritesToTheMask(HookEngine):
    """Fills the caller's mask with ones."""

    def remember_pass(self, model: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        super().remember_pass(model, args, kwargs)
        if self.mask is not None:
            self.mask.fill_(1)
