"""An honest engine made of plain forward hooks, and so of another kind than freeze_core: what checks must accept.

Small methods, so that a broken engine (`broken_engines.py`) is an honest one with a single method changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from hooked_layers import Layer, layers
from torch import Tensor, nn

from freeze_core import InterventionConfig, InterventionError, StaleCacheWarning
from freeze_core.attention.sites import find_sites
from freeze_core.statistics import model_identity
from pytest_circuitfreeze.recordings import Calibrated, Recorded, calibrated, recorded
from pytest_circuitfreeze.strategies import Batch

CIRCUITS = {"qk": "qk", "ov": "v", "both": "qkv", "q": "q", "k": "k", "v": "v"}


class Blend(torch.autograd.Function):
    """Gives `value`; passes `factor` of the gradient to `x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.expand_as(x).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.factor, None, None


class HookEngine:
    """Freezes by forward hooks on the projections; keeps the configs that are on, and hooks anew at each change."""

    name = "hooks"

    def __init__(self) -> None:
        self.on: list[tuple[object, list[InterventionConfig]]] = []
        self.mask: Tensor | None = None
        self.cached = 0
        self.sparing = False
        self.spared: Tensor | None = None
        self.mark: tuple[list[int], str] = ([], "")
        self.undo: list[Callable[[], object]] = []

    @contextmanager
    def freeze(
        self, model: nn.Module, config: InterventionConfig | Sequence[InterventionConfig]
    ) -> Iterator[Callable[..., Any]]:
        token = object()
        configs = [config] if isinstance(config, InterventionConfig) else list(config)
        self.refuse_foreign_statistics(model, configs)
        self.on.append((token, configs))
        self.install(model)
        try:
            yield model
        finally:
            self.on = [entry for entry in self.on if entry[0] is not token]
            self.install(model)

    def install(self, model: nn.Module) -> None:
        while self.undo:
            self.undo.pop()()
        configs = [config for _, several in self.on for config in several if config.strength > 0]
        if not configs:
            return
        self.mark = ([], repr(configs))
        self.undo.append(model.register_forward_pre_hook(self.remember_pass, with_kwargs=True).remove)
        self.undo.append(model.register_forward_hook(self.mark_cache).remove)
        for layer in layers(model):
            self.install_layer(layer, configs)

    def install_layer(self, layer: Layer, configs: list[InterventionConfig]) -> None:
        own = [config for config in configs if self.in_layer(config, layer)]
        shared = layer.kv_heads < layer.heads
        wide = shared and any(c.kv_scope == "head" and set(CIRCUITS[c.circuit]) & {"k", "v"} for c in own)
        if wide:
            assert layer.module.num_key_value_groups > 1, "hooks can un-share separate projections alone"
            self.set_attribute(layer.module, "num_key_value_groups", 1)
            self.mark[0].append(layer.number)
        for role in "qkv" if own else "":
            name, features = layer.places[role]
            hook = self.hook(layer, role, features, own, wide and role != "q")
            self.undo.append(getattr(layer.module, name).register_forward_hook(hook).remove)
        if any(config.backward_mode == "circuit_ste" for config in own):
            self.run_twice(layer)

    def run_twice(self, layer: Layer) -> None:
        """Runs the attention as it is without its `circuit_ste` freezes first, and lets the gradient of z go there."""
        module, forward = layer.module, layer.module.forward

        def twice(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                self.sparing = True
                try:
                    forward(*args, **kwargs)
                finally:
                    self.sparing = False
            return forward(*args, **kwargs)

        def splice(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if self.sparing:
                self.spared = args[0]
                return None
            spared, self.spared = self.spared, None
            return None if spared is None else (Blend.apply(spared, args[0], 1.0), *args[1:])

        self.undo.append(layer.output.register_forward_pre_hook(splice).remove)
        module.forward = twice
        self.undo.append(lambda: delattr(module, "forward"))

    def set_attribute(self, module: nn.Module, name: str, value: object) -> None:
        old = getattr(module, name)
        setattr(module, name, value)
        self.undo.append(lambda: setattr(module, name, old))

    def remember_pass(self, model: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        self.mask = kwargs.get("attention_mask")
        cache = kwargs.get("past_key_values")
        self.cached = 0 if cache is None else cache.get_seq_length()
        if self.cached:
            self.check_cache(cache)

    def check_cache(self, cache: Any) -> None:
        wide, frozen = getattr(cache, "filled_under", ([], ""))
        if wide != self.mark[0]:
            raise InterventionError(f"the heads of layers {wide} have keys of their own in this cache")
        if frozen != self.mark[1]:
            warnings.warn("this cache was filled under another freeze", StaleCacheWarning, stacklevel=2)

    def mark_cache(self, model: nn.Module, args: object, output: Any) -> None:
        if getattr(output, "past_key_values", None) is not None and not self.cached:
            output.past_key_values.filled_under = self.mark

    def refuse_foreign_statistics(self, model: nn.Module, configs: list[InterventionConfig]) -> None:
        for statistics in (config.statistics for config in configs):
            if statistics is not None and statistics.identity != model_identity(find_sites(model)):
                raise InterventionError("statistics are of another model: calibrate this one")

    def recorded(self, model: Any, source: Batch) -> Recorded:
        return recorded(model, source)

    def calibrated(self, model: Any, sources: list[Batch]) -> Calibrated:
        return calibrated(model, sources)

    def in_layer(self, config: InterventionConfig, layer: Layer) -> bool:
        return config.layer_indices is None or layer.number in config.layer_indices

    def hook(
        self, layer: Layer, role: str, features: Tensor, configs: list[InterventionConfig], wide: bool
    ) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def edit(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            whole = output.flatten(1, -2)  # [batch, token, feature], some families have a dimension more
            x = whole[..., features]
            if not wide:
                result = whole.clone()
                result[..., features] = self.frozen(layer, role, x, configs, layer.heads // features.shape[0])
                return result.view(output.shape)
            x = x.repeat_interleave(layer.heads // layer.kv_heads, dim=2)
            return self.frozen(layer, role, x, configs, 1).flatten(2)

        return edit

    def frozen(self, layer: Layer, role: str, x: Tensor, configs: list[InterventionConfig], readers: int) -> Tensor:
        """All freezes of an activation `[batch, token, head, feature]`; `readers` query heads read each head."""
        result = x
        for config in configs:
            if role not in self.roles(config):
                continue
            heads = self.heads(layer, role, config, readers)
            if self.sparing and self.is_spared(role, config):
                result = result.index_copy(2, torch.tensor(heads), x[:, :, heads])
                continue
            value = self.replacement(layer, role, x, config).expand_as(x)[:, :, heads]
            result = result.clone()
            result[:, :, heads] = self.blend(x[:, :, heads], value, config)
        return result

    def is_spared(self, role: str, config: InterventionConfig) -> bool:
        """Whether the gradient is to flow as if this freeze had not been made."""
        return config.backward_mode == "circuit_ste"

    def roles(self, config: InterventionConfig) -> str:
        return CIRCUITS[config.circuit]

    def heads(self, layer: Layer, role: str, config: InterventionConfig, readers: int) -> list[int]:
        chosen = set(range(layer.heads) if config.head_indices is None else config.head_indices)
        if role != "q" and config.kv_scope == "group":
            group = layer.heads // layer.kv_heads
            chosen = {head for head in range(layer.heads) if head // group in {one // group for one in chosen}}
        return sorted({head // readers for head in chosen})

    def replacement(self, layer: Layer, role: str, x: Tensor, config: InterventionConfig) -> Tensor:
        x = x.detach()
        if config.freeze_type == "zero":
            return torch.zeros_like(x)
        if config.freeze_type == "reference":
            return self.reference(layer, role, x, config)
        if config.freeze_type == "resample":
            return self.resample(x, config)
        e = self.noise(layer, role, x, config) if config.freeze_type == "noise" else torch.zeros(())
        if config.noise_std is not None:
            return config.noise_std * e
        mean, deviation = self.statistics(layer, role, x, config)
        return mean + deviation * e

    def reference(self, layer: Layer, role: str, x: Tensor, config: InterventionConfig) -> Tensor:
        assert config.reference is not None
        value = self.for_heads(getattr(config.reference[layer.number], role), x)
        if self.cached or value.shape[1] != x.shape[1] or len(value) not in (1, len(x)):
            raise InterventionError(f"the reference is of shape {list(value.shape)}, this pass of {list(x.shape)}")
        if not self.padded_alike(x, config.reference.attention_mask):
            raise InterventionError("the reference was recorded under another attention_mask: record it under this one")
        return value

    def padded_alike(self, x: Tensor, mask: Tensor | None) -> bool:
        ones = torch.ones(x.shape[:2], dtype=torch.long)
        return bool(((ones if mask is None else mask) == (ones if self.mask is None else self.mask)).all())

    def for_heads(self, values: Tensor, x: Tensor) -> Tensor:
        """Values `[..., head, feature]` for as many heads as `x` has; neighbours share those of a KV head."""
        return values[..., : x.shape[-1]].to(x).repeat_interleave(x.shape[2] // values.shape[-2], dim=-2)

    def resample(self, x: Tensor, config: InterventionConfig) -> Tensor:
        if len(x) < 2 or (self.mask is not None and not self.mask.all()):
            raise InterventionError("resample needs two rows at least, and none with padding")
        return x[self.rows(config.seed, len(x))]

    def rows(self, seed: int, count: int) -> Tensor:
        """Which row takes the place of each."""
        return torch.arange(count).roll(1 + seed % (count - 1))

    def statistics(
        self, layer: Layer, role: str, x: Tensor, config: InterventionConfig
    ) -> tuple[Tensor, Tensor | float]:
        """Mean and deviation `[head, feature]`."""
        if config.statistics is not None:
            own = config.statistics[layer.number]
            return self.for_heads(own.mean[role], x), self.for_heads(own.std[role], x)  # type: ignore[index]
        if self.cached:
            raise InterventionError("a step that goes on from a cache has no statistics of its own: calibrate some")
        samples = self.samples(x)
        return samples.mean(0), samples.std(0, correction=0)

    def samples(self, x: Tensor) -> Tensor:
        """What statistics are taken of, `[sample, head, feature]`."""
        return x.flatten(0, 1) if self.mask is None else x[self.mask.bool()]

    def noise(self, layer: Layer, role: str, x: Tensor, config: InterventionConfig) -> Tensor:
        count = layer.heads if role == "q" else layer.kv_heads
        key = (abs(config.seed), int(config.seed < 0), layer.number, "qkv".index(role))
        e = self.draw(np.random.default_rng(key), (self.cached + x.shape[1], count, x.shape[-1]))[self.cached :]
        return torch.from_numpy(e).to(x).repeat_interleave(x.shape[2] // count, dim=1)

    def draw(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return generator.standard_normal(shape)

    def blend(self, x: Tensor, r: Tensor, config: InterventionConfig) -> Tensor:
        value = r if config.strength == 1 else (x + config.strength * (r - x)).detach()
        return Blend.apply(x, value.to(x.dtype), self.gradient_factor(config))

    def gradient_factor(self, config: InterventionConfig) -> float:
        return 1.0 if config.backward_mode == "ste" else 1.0 - config.strength
