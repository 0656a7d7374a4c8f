"""Engines that lay hands on what is not their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from honest_engine import HookEngine, Layer, layers
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


class EndsHooksOfOthers(HookEngine):
    """Removes all hooks of a model, others' too, when a freeze ends."""

    @contextmanager
    def freeze(self, model: nn.Module, config: Any) -> Iterator[Callable[..., Any]]:
        with super().freeze(model, config) as frozen:
            yield frozen
        for module in model.modules():
            module._forward_pre_hooks.clear()


class EndsForwardHooksOfOthers(HookEngine):
    """Removes all hooks behind the forwards of attention layers, others' too, when a freeze ends."""

    @contextmanager
    def freeze(self, model: nn.Module, config: Any) -> Iterator[Callable[..., Any]]:
        with super().freeze(model, config) as frozen:
            yield frozen
        for layer in layers(model):
            for module in layer.module.modules():
                module._forward_hooks.clear()
        self.install(model)


class HidesHooksOfOthers(HookEngine):
    """Runs frozen layers without the hooks that others put there after it."""

    @contextmanager
    def freeze(self, model: nn.Module, config: Any) -> Iterator[Callable[..., Any]]:
        with super().freeze(model, config) as frozen:

            def run(**arguments: Any) -> Any:
                kept = [(module, dict(module._forward_pre_hooks)) for module in model.modules() if module is not model]
                for module, _ in kept:
                    module._forward_pre_hooks.clear()
                try:
                    return frozen(**arguments)
                finally:
                    for module, hooks in kept:
                        module._forward_pre_hooks.update(hooks)

            yield run


class RecomputesTheProjection(HookEngine):
    """Works out each activation from the weights, whatever hooks or adapters of others made of it."""

    def hook(
        self, layer: Layer, role: str, features: Tensor, configs: list[Config], wide: bool
    ) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        edit = super().hook(layer, role, features, configs, wide)
        name, _ = layer.places[role]
        if role != next(one for one in "qkv" if layer.places[one][0] == name):  # others go on from the first
            return edit
        return lambda module, args, output: edit(module, args, module.forward(*args))


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


class EditsInPlace(HookEngine):
    """Writes replacements into what the projection gave."""

    def edited(self, layer: Layer, role: str, features: Tensor, output: Tensor, configs: list[Config]) -> Tensor:
        whole = output.flatten(1, -2)
        readers = layer.heads // len(features)
        whole[..., features] = self.frozen(layer, role, whole[..., features], configs, readers)
        return output


class WritesToTheMask(HookEngine):
    """Fills the caller's mask with ones."""

    def remember_pass(self, model: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        super().remember_pass(model, args, kwargs)
        if self.mask is not None:
            callers, self.mask = self.mask, self.mask.clone()
            callers.fill_(1)


class ReadsTheConfigLate(HookEngine):
    """Keeps the caller's config, and so freezes as it says by the time of the pass."""

    @contextmanager
    def freeze(self, model: nn.Module, config: Config | Sequence[Config]) -> Iterator[Callable[..., Any]]:
        with super().freeze(model, config) as frozen:
            token, _ = self.on.pop()
            self.on.append((token, [config] if isinstance(config, Config) else list(config)))
            self.install(model)
            yield frozen
