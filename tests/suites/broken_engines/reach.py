"""Engines that reach other heads, layers, positions, rows or modules than they should."""

from __future__ import annotations

from typing import Any

import torch
from honest_engine import Blend, HookEngine, Layer
from torch import Tensor, nn

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
    """Freezes the layer before, too, where it has what to freeze it to."""

    def in_layer(self, config: Config, layer: Layer) -> bool:
        known = config.reference or config.statistics or {layer.number}
        return (
            any(layer.number in (wanted, wanted - 1) for wanted in config.layer_indices or ()) and layer.number in known
        )


class LooksAhead(HookEngine):
    """Replaces by a trace of the last token."""

    def replacement(self, layer: Layer, role: str, x: Tensor, config: Config) -> Tensor:
        return super().replacement(layer, role, x, config) + 1e-3 * x[:, -1:].detach()


class LooksAcross(HookEngine):
    """Replaces by a trace of the first row."""

    def replacement(self, layer: Layer, role: str, x: Tensor, config: Config) -> Tensor:
        return super().replacement(layer, role, x, config) + 1e-3 * x[:1].detach()


class DoesNothing(HookEngine):
    """Leaves the model as it is."""

    def install(self, model: nn.Module) -> None:
        pass


class LayerBeforeAlone(HookEngine):
    """Freezes the layer before in the place of the one that was asked for."""

    def in_layer(self, config: Config, layer: Layer) -> bool:
        return layer.number + 1 in (config.layer_indices or ())


class NextGroup(HookEngine):
    """Freezes keys and values of the KV head after the one that is read, queries of the right head."""

    def heads(self, layer: Layer, role: str, config: Config, readers: int) -> list[int]:
        heads = super().heads(layer, role, config, readers)
        return heads if role == "q" or readers == 1 else sorted((head + 1) % layer.kv_heads for head in heads)


class FirstRowOnly(HookEngine):
    """Freezes the first row of a batch alone."""

    def frozen(self, layer: Layer, role: str, x: Tensor, configs: list[Config], readers: int) -> Tensor:
        return torch.cat([super().frozen(layer, role, x, configs, readers)[:1], x[1:]])


class SparesTheLastPosition(HookEngine):
    """Freezes all positions but the last."""

    def frozen(self, layer: Layer, role: str, x: Tensor, configs: list[Config], readers: int) -> Tensor:
        return torch.cat([super().frozen(layer, role, x, configs, readers)[:, :-1], x[:, -1:]], dim=1)


class SpillsOver(HookEngine):
    """Moves the head after a frozen one by a millionth."""

    def frozen(self, layer: Layer, role: str, x: Tensor, configs: list[Config], readers: int) -> Tensor:
        own = [config for config in configs if role in self.roles(config)]
        heads = {head for config in own for head in self.heads(layer, role, config, readers)}
        result = super().frozen(layer, role, x, configs, readers).clone()
        result[:, :, sorted({(head + 1) % x.shape[2] for head in heads} - heads)] += 1e-6
        return result


class HalvesTheMLP(HookEngine):
    """Halves what the MLP behind a frozen attention gives."""

    def install(self, model: nn.Module) -> None:
        self.model = model
        super().install(model)

    def install_layer(self, layer: Layer, configs: list[Config]) -> None:
        super().install_layer(layer, configs)
        if any(self.in_layer(config, layer) for config in configs):
            self.undo.append(self.mlp(layer).register_forward_hook(self.spoil).remove)

    def mlp(self, layer: Layer) -> nn.Module:
        block: Any = next(each for each in self.model.modules() if layer.module in each.children())
        return block.mlp

    def spoil(self, module: nn.Module, args: object, output: Tensor) -> Tensor:
        return output / 2


class HalvesTheGradientOfTheMLP(HalvesTheMLP):
    """Halves the gradient of what the MLP behind a frozen attention gives."""

    def spoil(self, module: nn.Module, args: object, output: Tensor) -> Tensor:
        return Blend.apply(output, output.detach(), 0.5)
