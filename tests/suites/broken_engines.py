"""Engines that are broken on purpose, each in one way, and the check that must refuse each.

`BROKEN` maps a check's name to the engines that it must refuse on the case of the same name in `test_checks.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from honest_engine import HookEngine, Layer
from torch import Tensor, nn

from freeze_core import InterventionConfig

Config = InterventionConfig


# --- values


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
        return samples.mean(0) + samples.std(0) * self.noise(layer, role, x, config)


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
        eager = layer.module.config._attn_implementation == "eager"  # type: ignore[union-attr]
        return x if eager else super().frozen(layer, role, x, configs, readers)


# --- noise


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


# --- independence, locality, grouping


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


# --- storage


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


# --- gradients


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


# --- removal


class LeavesAHook(HookEngine):
    """Leaves its last hook on."""

    def install(self, model: nn.Module) -> None:
        del self.undo[1:2]
        super().install(model)


class LeavesAnAttribute(HookEngine):
    """Leaves a note on the attention module."""

    def install_layer(self, layer: Layer, configs: list[Config]) -> None:
        layer.module.frozen = True  # type: ignore[assignment]
        super().install_layer(layer, configs)


class LeavesAParameterMoved(HookEngine):
    """Adds to a parameter and takes away again."""

    def install_layer(self, layer: Layer, configs: list[Config]) -> None:
        super().install_layer(layer, configs)
        parameter = next(layer.module.parameters())
        parameter.data += 1.0
        self.undo.append(lambda: parameter.data.sub_(1.0))


class ForgetsOnError(HookEngine):
    """Removes nothing when the block raises."""

    @contextmanager
    def freeze(self, model: nn.Module, config: Any) -> Iterator[Callable[..., Any]]:
        self.on = [(self, [config])]
        self.install(model)
        yield model
        self.on = []
        self.install(model)


class SwallowsErrors(HookEngine):
    """Ends the block quietly when it raises."""

    @contextmanager
    def freeze(self, model: nn.Module, config: Any) -> Iterator[Callable[..., Any]]:
        try:
            with super().freeze(model, config) as frozen:
                yield frozen
        except Exception:  # the flaw
            pass


class OffAfterAnError(HookEngine):
    """Does nothing in the pass after one that did not come to its end."""

    def __init__(self) -> None:
        super().__init__()
        self.running = False
        self.off = False

    def remember_mask(self, model: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        super().remember_mask(model, args, kwargs)
        self.off, self.running = self.running, True

    def install(self, model: nn.Module) -> None:
        super().install(model)
        self.running = False
        if self.undo:
            self.undo.append(model.register_forward_hook(self.end).remove)

    def end(self, *_: object) -> None:
        self.running = False

    def frozen(self, layer: Layer, role: str, x: Tensor, configs: list[Config], readers: int) -> Tensor:
        return x if self.off else super().frozen(layer, role, x, configs, readers)


class RemembersTheFirstBatch(HookEngine):
    """Keeps the replacement of the first pass."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[tuple[int, str], Tensor] = {}

    def replacement(self, layer: Layer, role: str, x: Tensor, config: Config) -> Tensor:
        first = super().replacement(layer, role, x, config).mean((0, 1) if config.freeze_type == "zero" else ())
        return self.kept.setdefault((layer.number, role), first)

    def install(self, model: nn.Module) -> None:
        self.kept.clear()
        super().install(model)


class LastOneOnly(HookEngine):
    """Keeps the innermost of nested freezes alone."""

    def install(self, model: nn.Module) -> None:
        kept, self.on = self.on, self.on[-1:]
        super().install(model)
        self.on = kept


class EndsTheInnermost(HookEngine):
    """Ends the freeze that began last, whichever was asked for."""

    @contextmanager
    def freeze(self, model: nn.Module, config: Config | Sequence[Config]) -> Iterator[Callable[..., Any]]:
        self.on.append((object(), [config] if isinstance(config, Config) else list(config)))
        self.install(model)
        try:
            yield model
        finally:
            self.on.pop()
            self.install(model)


# --- state


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

    def remember_mask(self, model: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        super().remember_mask(model, args, kwargs)
        if self.mask is not None:
            self.mask.fill_(1)


BROKEN: Mapping[str, Sequence[type[HookEngine]]] = {
    "check_values_are_the_oracles": [
        MeanOverPadding,
        SampleDeviation,
        WholeAtAnyStrength,
        NextHead,
        KeyForQuery,
        FirstOneWins,
        FreezesTheFrozen,
        RoundsOff,
        HeadsInTurn,
        GroupForHead,
        CutsInThree,
        NoiseOfTheRow,
    ],
    "check_zero_strength_is_unfrozen": [NoStrengthIsLittle],
    "check_full_strength_replaces_anything": [Multiplies],
    "check_implementations_agree": [BlindUnderEager],
    "check_noise_is_standard_normal": [
        UniformNoise,
        NarrowNoise,
        OneDrawForAllHeads,
        OneDrawForAllColumns,
        OneDrawForAllLayers,
        OneDrawForKAndV,
        ForgetsTheSeed,
    ],
    "check_noise_depends_on_its_place_alone": [NoiseOfTheRow, NoiseOfTheLength, NoiseOfTheCircuit],
    "check_qk_leaves_ov": [TouchesEverything, NextHead],
    "check_ov_leaves_qk": [TouchesEverything, KeysWithValues],
    "check_order_does_not_matter": [OVFollowsQK],
    "check_other_heads_are_untouched": [NextHead, GroupForHead, TouchesEverything],
    "check_earlier_layers_are_untouched": [LayerBefore],
    "check_later_tokens_do_not_matter": [LooksAhead],
    "check_rows_do_not_matter": [LooksAcross],
    "check_frozen_values_reach_their_readers": [HeadsInTurn, GroupForHead, NextHead],
    "check_frozen_queries_and_keys_reach_their_readers": [HeadsInTurn, GroupForHead, NextHead],
    "check_storage_does_not_matter": [CutsInThree, CutsTheFusedGraph],
    "check_gradients_are_the_estimators": [
        AlwaysStops,
        NeverStops,
        StopsAtAnyStrength,
        StopsAlmost,
        MeanCarriesGradient,
        LosesParameters,
    ],
    "check_removal_leaves_no_trace": [LeavesAHook, LeavesAnAttribute, LeavesAParameterMoved],
    "check_error_in_body_leaves_no_trace": [ForgetsOnError, SwallowsErrors],
    "check_error_in_forward_leaves_no_trace": [OffAfterAnError],
    "check_freezes_can_be_repeated": [RemembersTheFirstBatch],
    "check_nesting_is_a_list": [LastOneOnly, EndsTheInnermost],
    "check_parameters_are_untouched": [ZeroesWeights, SwitchesToEval],
    "check_generators_are_untouched": [DrawsFromTorch, SeedsTorch],
    "check_inputs_are_not_written_to": [WritesToItsInput, WritesToTheMask],
}
