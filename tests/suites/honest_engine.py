"""An honest engine made of plain forward hooks, and so of another kind than freeze_core: what checks must accept.

Small methods, so that a broken engine (`broken_engines.py`) is an honest one with a single method changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from freeze_core import InterventionConfig, InterventionError, StaleCacheWarning

CIRCUITS = {"qk": "qk", "ov": "v", "both": "qkv", "q": "q", "k": "k", "v": "v"}


@dataclass(eq=False)
class Layer:
    """An attention layer: for each role, a module's name and the features `[head, feature]` of its output."""

    number: int
    module: nn.Module
    places: dict[str, tuple[str, Tensor]]
    heads: int
    kv_heads: int


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
        self.mark: tuple[list[int], str] = ([], "")
        self.undo: list[Callable[[], object]] = []

    @contextmanager
    def freeze(
        self, model: nn.Module, config: InterventionConfig | Sequence[InterventionConfig]
    ) -> Iterator[Callable[..., Any]]:
        token = object()
        self.on.append((token, [config] if isinstance(config, InterventionConfig) else list(config)))
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
        self.undo.append(model.register_forward_pre_hook(self.remember_mask, with_kwargs=True).remove)
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

    def set_attribute(self, module: nn.Module, name: str, value: object) -> None:
        old = getattr(module, name)
        setattr(module, name, value)
        self.undo.append(lambda: setattr(module, name, old))

    def remember_mask(self, model: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
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
            value = self.replacement(layer, role, x, config).expand_as(x)[:, :, heads]
            result = result.clone()
            result[:, :, heads] = self.blend(x[:, :, heads], value, config)
        return result

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
        if config.noise_std is not None:
            return config.noise_std * self.noise(layer, role, x, config)
        mean, deviation = self.moments(layer, role, x, config)
        return mean if config.freeze_type == "mean" else mean + deviation * self.noise(layer, role, x, config)

    def moments(self, layer: Layer, role: str, x: Tensor, config: InterventionConfig) -> tuple[Tensor, Tensor]:
        """Mean and deviation `[head, feature]`, of the pass or calibrated."""
        if config.statistics is None:
            samples = self.samples(x)
            return samples.mean(0), samples.std(0, correction=0)
        own = config.statistics[layer.number]
        mean, deviation = own.mean[role].to(x), own.std[role].to(x)
        shared = x.shape[2] // len(mean)
        return mean.repeat_interleave(shared, 0), deviation.repeat_interleave(shared, 0)

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


def layers(model: nn.Module) -> list[Layer]:
    """The attention layers of GPT-2, OPT, LLaMA-like models, Phi-3, Falcon and a few others, or of split ones."""
    config: Any = model.config
    heads = config.num_attention_heads
    features = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", heads)
    fused, blocks = FUSED.get(config.model_type, ""), torch.empty(0)
    if config.model_type == "falcon":
        kv_heads = config.num_kv_heads
        if not config.new_decoder_architecture and config.multi_query:
            kv_heads = 1
    elif config.model_type == "gpt_bigcode" and config.multi_query:
        kv_heads = 1
    found: list[Layer] = []
    for path, module in model.named_modules():
        names = {name for name, _ in module.named_children()}
        if "kv_b_proj" in names:
            places, kv_heads = latent_places(config), heads
        elif "q_proj" in names:
            each = {"q": heads, "k": kv_heads, "v": kv_heads}
            places = {r: (f"{r}_proj", torch.arange(n * features).view(n, features)) for r, n in each.items()}
            if config.model_type == "qwen3_next":  # a gate behind each query
                places["q"] = ("q_proj", torch.arange(2 * heads * features).view(heads, -1)[:, :features])
        elif fused in names:
            blocks = torch.arange((heads + 2 * kv_heads) * features).view(-1, features)
            places = {r: (fused, blocks[order]) for r, order in fused_order(config, heads, kv_heads).items()}
        else:
            continue
        number = next(int(part) for part in path.split(".") if part.isdecimal())
        found.append(Layer(number, module, places, heads, kv_heads))
    return found


FUSED = {
    "gpt2": "c_attn",
    "phi3": "qkv_proj",
    "falcon": "query_key_value",
    "bloom": "query_key_value",
    "gpt_bigcode": "c_attn",
}


def latent_places(config: Any) -> dict[str, tuple[str, Tensor]]:
    """Multi-head latent attention, but for its keys: part of them is all heads' own."""
    heads, plain, value = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    unpacked = torch.arange(heads * (plain + value)).view(heads, -1)
    queries = torch.arange(heads * (plain + config.qk_rope_head_dim)).view(heads, -1)
    return {
        "q": ("q_b_proj", queries),
        "k": ("kv_b_proj", unpacked[:, :plain]),
        "v": ("kv_b_proj", unpacked[:, plain:]),
    }


def fused_order(config: Any, heads: int, kv_heads: int) -> dict[str, list[int]]:
    """Which block of head features of a fused projection is whose."""
    total = heads + 2 * kv_heads
    if config.model_type == "falcon" and config.new_decoder_architecture:
        per = heads // kv_heads + 2
        at = {"k": [g * per + per - 2 for g in range(kv_heads)], "v": [g * per + per - 1 for g in range(kv_heads)]}
        return {"q": [b for b in range(total) if b not in at["k"] + at["v"]], **at}
    if config.model_type == "bloom" or (config.model_type in ("falcon", "gpt_bigcode") and not config.multi_query):
        return {"q": list(range(0, total, 3)), "k": list(range(1, total, 3)), "v": list(range(2, total, 3))}
    return {
        "q": list(range(heads)),
        "k": list(range(heads, heads + kv_heads)),
        "v": list(range(heads + kv_heads, total)),
    }
