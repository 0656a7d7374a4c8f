"""Engines that are honest until a cache, or a pass that is run again, is in play."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from honest_engine import HookEngine, Layer
from torch import Tensor, nn

from freeze_core import InterventionConfig
from pytest_circuitfreeze.adapters.arithmetic import cache_among

Config = InterventionConfig


class SparesDecoding(HookEngine):
    """Freezes no pass that goes on from a cache."""

    def frozen(self, layer: Layer, role: str, x: Tensor, configs: list[Config], readers: int) -> Tensor:
        return x if self.cached else super().frozen(layer, role, x, configs, readers)


class SparesThePrompt(HookEngine):
    """Freezes no pass that fills a new cache: what is cached of the prompt is not frozen."""

    def remember_pass(self, model: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        super().remember_pass(model, args, kwargs)
        self.filling = bool(kwargs.get("use_cache")) and not self.cached

    def frozen(self, layer: Layer, role: str, x: Tensor, configs: list[Config], readers: int) -> Tensor:
        return x if self.filling else super().frozen(layer, role, x, configs, readers)


class LastPositionOnly(HookEngine):
    """Freezes the last position of each pass alone."""

    def frozen(self, layer: Layer, role: str, x: Tensor, configs: list[Config], readers: int) -> Tensor:
        return torch.cat([x[:, :-1], super().frozen(layer, role, x, configs, readers)[:, -1:]], dim=1)


class StatisticsOfTheStep(HookEngine):
    """Takes statistics of the pass, whatever was calibrated."""

    def statistics(self, layer: Layer, role: str, x: Tensor, config: Config) -> tuple[Tensor, Tensor]:
        samples = x.flatten(0, 1)
        return samples.mean(0), samples.std(0, correction=0)


class NoiseOfTheStep(HookEngine):
    """Counts columns from the beginning of each pass."""

    def noise(self, layer: Layer, role: str, x: Tensor, config: Config) -> Tensor:
        self.cached = 0
        return super().noise(layer, role, x, config)


class NoiseOfTheCache(HookEngine):
    """Draws otherwise for each length of the cache."""

    def noise(self, layer: Layer, role: str, x: Tensor, config: Config) -> Tensor:
        return super().noise(layer, role, x, Config(seed=config.seed + self.cached))


class NoiseOfRealTokens(HookEngine):
    """Does not count padding: the columns of a step begin behind the most real tokens of a row."""

    def noise(self, layer: Layer, role: str, x: Tensor, config: Config) -> Tensor:
        if self.cached and self.mask is not None:
            self.cached = max(0, int(self.mask.sum(1).max()) - x.shape[1])
        return super().noise(layer, role, x, config)


class ColumnsFromTheKeptKeys(HookEngine):
    """Counts cached columns by the keys that are kept, which a sliding window lets go of."""

    def remember_pass(self, model: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        super().remember_pass(model, args, kwargs)
        if self.cached:
            self.cached = cache_among(kwargs.values()).layers[0].keys.shape[-2]


class NeverWarns(HookEngine):
    """Takes any cache for its own, where the model does."""

    def check_cache(self, cache: Any) -> None:
        pass


class AlwaysWarns(HookEngine):
    """Takes no cache for its own."""

    def mark_cache(self, model: nn.Module, args: object, output: Any) -> None:
        super().mark_cache(model, args, output)
        if (cache := cache_among(output.values())) is not None:
            cache.filled_under = (self.mark[0], "another freeze")


class OneMarkForAllFreezes(HookEngine):
    """Marks that a cache was frozen, not how."""

    def install(self, model: nn.Module) -> None:
        super().install(model)
        self.mark = (self.mark[0], "frozen")


class MarksTheStrengthAlone(HookEngine):
    """Marks caches with the strengths of the freezes that filled them, not with what was frozen."""

    def install(self, model: nn.Module) -> None:
        super().install(model)
        self.mark = (self.mark[0], repr([config.strength for _, asked in self.on for config in asked]))


class MarkIsLostInCopies(HookEngine):
    """Knows the cache objects that it has filled, and so no copy of one."""

    def __init__(self) -> None:
        super().__init__()
        self.known: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

    def mark_cache(self, model: nn.Module, args: object, output: Any) -> None:
        if (cache := cache_among(output.values())) is not None and not self.cached:
            self.known[cache] = self.mark

    def check_cache(self, cache: Any) -> None:
        super().check_cache(type("Known", (), {"filled_under": self.known.get(cache, ([], ""))}))


class MarkIsLostWhenCropped(HookEngine):
    """Knows a cache by its length, too, and so none that was cropped."""

    def check_cache(self, cache: Any) -> None:
        if getattr(cache, "filled_to", self.cached) != self.cached:
            cache.filled_under = (self.mark[0], "another freeze")
        super().check_cache(cache)


class MarkIsLostWhenReordered(HookEngine):
    """Knows a cache by the first key that it holds, and so none whose rows were reordered."""

    def mark_cache(self, model: nn.Module, args: object, output: Any) -> None:
        super().mark_cache(model, args, output)
        if (cache := cache_among(output.values())) is not None:
            cache.first = self.first(cache)

    def check_cache(self, cache: Any) -> None:
        if not torch.equal(getattr(cache, "first", self.first(cache)), self.first(cache)):
            cache.filled_under = (self.mark[0], "another freeze")
        super().check_cache(cache)

    def first(self, cache: Any) -> Tensor:
        first: Tensor = cache.layers[0].keys[0, 0, 0]
        return first


class TakesWhatWasAddedForItsOwn(HookEngine):
    """Takes a cache for its own that it has filled first, whatever was added to it since."""

    def mark_cache(self, model: nn.Module, args: object, output: Any) -> None:
        super().mark_cache(model, args, output)
        if (cache := cache_among(output.values())) is not None:
            del cache.filled_to


class WarnsWhereItMustRefuse(HookEngine):
    """Warns of a cache of other KV heads, and lets the model end in an error of its own."""

    def check_cache(self, cache: Any) -> None:
        super().check_cache(type("AsWide", (), {"filled_under": (self.mark[0], getattr(cache, "filled_under", ""))}))


class NoiseOfThePass(HookEngine):
    """Draws anew each time that an activation is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn = 0

    def noise(self, layer: Layer, role: str, x: Tensor, config: Config) -> Tensor:
        self.drawn += 1
        return super().noise(layer, role, x, Config(seed=config.seed + self.drawn))


class NoNoiseInRecomputation(HookEngine):
    """Draws zeros in a pass that is run again for its gradient."""

    def noise(self, layer: Layer, role: str, x: Tensor, config: Config) -> Tensor:
        again = torch._C._current_graph_task_id() != -1
        return super().noise(layer, role, x, config) * (not again)


class MaskOfTheLastPass(HookEngine):
    """Takes what runs again to be padded as the last pass was, if that was of its shape, and not at all otherwise."""

    def keeping(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        return checkpoint

    def samples(self, x: Tensor) -> Tensor:
        alike = self.mask is not None and self.mask.shape == x.shape[:2]
        return super().samples(x) if alike else x.flatten(0, 1)
