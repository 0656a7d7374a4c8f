"""What a freeze computes, in plain torch: the same for every library that puts it in force.

A freeze by hand needs a place where an activation can be read and replaced; what it is replaced by, and what that does
backwards, is no library's business. An adapter derives from `Arithmetic` and hands each activation to `frozen`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache

from freeze_core import InterventionConfig, InterventionError
from freeze_core.attention.sites import find_sites
from freeze_core.identity import is_same_model
from pytest_circuitfreeze.adapters.places import Layer, layers, unknown

CIRCUITS = {"qk": "qk", "ov": "v", "both": "qkv", "q": "q", "k": "k", "v": "v"}


class Blend(torch.autograd.Function):
    """Gives `value`; passes `factor` of the gradient to `x`, and of its tangent on."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, value: Tensor, factor: float) -> Tensor:
        return value.expand_as(x).clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        ctx.factor = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.factor, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        product: Tensor = tangent * ctx.factor
        return product


def several(model: nn.Module, config: InterventionConfig | Sequence[InterventionConfig]) -> list[InterventionConfig]:
    """Copies of one config or several, which may be changed later, with layers and heads counted from the front."""
    sizes: Any = model.config
    depth, heads = sizes.num_hidden_layers, sizes.num_attention_heads
    return [
        replace(
            one,
            layer_indices=[at % depth for at in (range(depth) if one.layer_indices is None else one.layer_indices)],
            head_indices=[at % heads for at in (range(heads) if one.head_indices is None else one.head_indices)],
        )
        for one in ([config] if isinstance(config, InterventionConfig) else config)
    ]


def unshares(layer: Layer, config: InterventionConfig) -> bool:
    """Whether a freeze gives query heads of a layer keys or values of their own."""
    return layer.kv_heads < layer.heads and config.kv_scope == "head" and bool({*CIRCUITS[config.circuit]} & {*"kv"})


def named(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a model is called with, by the names that its class has for it: libraries put their own forward on one."""
    _, *names = inspect.signature(type(model).forward).parameters
    return {**dict(zip(names, args, strict=False)), **kwargs}


def cache_among(values: Iterable[Any]) -> Any:
    """The cache among a model's arguments or among what it returned, or `None`: transformers has renamed it."""
    return next((value for value in values if isinstance(value, Cache)), None)


def beyond_outputs(
    model: nn.Module, config: InterventionConfig | Sequence[InterventionConfig], heads_are: str
) -> str | None:
    """Why a library cannot freeze so that reads and replaces q, k and v in one run of an attention, if it cannot.

    Args:
        heads_are: where it has the keys and values that heads share.
    """
    reason = unknown(model)
    if reason is not None:
        return reason
    configs = several(model, config)
    if any(one.backward_mode == "circuit_ste" for one in configs):
        return "backward_mode 'circuit_ste' takes the untouched attention beside the frozen one, and one is run"
    if any(unshares(layer, one) for layer in layers(model) for one in configs):
        return f"kv_scope 'head' takes one query head's keys and values; {heads_are} those that heads share"
    return None


class Arithmetic:
    """Replacements, chosen heads and estimators; small methods, each of one idea.

    It knows the pass that runs by what `remember` was told of it.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.cached = 0
        self.sparing = False

    def supports(self, model: nn.Module, config: InterventionConfig | Sequence[InterventionConfig]) -> str | None:
        """Why a freeze is not offered, if it is not."""
        raise NotImplementedError

    def asked(
        self, model: nn.Module, config: InterventionConfig | Sequence[InterventionConfig]
    ) -> list[InterventionConfig]:
        """Copies of what is to be put in force: one config or several, without those of no strength.

        Raises:
            InterventionError: `supports` has a reason, or statistics are of another model.
        """
        reason = self.supports(model, config)
        if reason is not None:
            raise InterventionError(reason)
        configs = several(model, config)
        self.refuse_foreign_statistics(model, configs)
        return [one for one in configs if one.strength > 0]

    def remember(self, arguments: Mapping[str, Any]) -> None:
        """Takes the mask and the number of cached columns from a pass's arguments by name."""
        self.mask = arguments.get("attention_mask")
        cache = cache_among(arguments.values())
        self.cached = 0 if cache is None else cache.get_seq_length()

    def refuse_foreign_statistics(self, model: nn.Module, configs: list[InterventionConfig]) -> None:
        for statistics in (config.statistics for config in configs):
            if statistics is not None and not is_same_model(statistics.identity, find_sites(model), "statistics"):
                raise InterventionError("statistics are of another model: calibrate this one")

    def in_layer(self, config: InterventionConfig, layer: Layer) -> bool:
        return config.layer_indices is None or layer.number in config.layer_indices

    def edited(
        self, layer: Layer, role: str, features: Tensor, output: Tensor, configs: list[InterventionConfig]
    ) -> Tensor:
        """The output of a projection with all freezes of the heads that its `features` `[head, feature]` hold."""
        whole = output.flatten(1, -2)  # [batch, token, feature], some families have a dimension more
        result = whole.clone()
        readers = layer.heads // len(features)
        result[..., features] = self.frozen(layer, role, whole[..., features], configs, readers)
        return result.view(output.shape)

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
            return self.for_heads(own.mean[role], x), self.for_heads(own.std[role], x)  # type: ignore[index]  # a role
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
        # Functions of autograd are called by `apply`, which is torch's and has no types.
        blended: Tensor = Blend.apply(x, value.to(x.dtype), self.gradient_factor(config))  # type: ignore[no-untyped-call]
        return blended

    def gradient_factor(self, config: InterventionConfig) -> float:
        return 1.0 if config.backward_mode == "ste" else 1.0 - config.strength
