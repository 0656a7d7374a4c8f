"""Hooks by hand: forward hooks on the projections, as anyone writes them without a library."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from freeze_core import InterventionConfig, InterventionError, StaleCacheWarning
from pytest_circuitfreeze.adapters.arithmetic import Arithmetic, Blend, cache_among, named, several, unshares
from pytest_circuitfreeze.adapters.places import Layer, layers, unknown

CHECKPOINT = "_gradient_checkpointing_func"
"""What transformers runs a layer by that is to be run again for its gradient."""


class HookEngine(Arithmetic):
    """Freezes by forward hooks on the projections; keeps the configs that are on, and hooks anew at each change."""

    name = "hooks"

    def __init__(self) -> None:
        super().__init__()
        self.on: list[tuple[object, list[InterventionConfig]]] = []
        self.spared: Tensor | None = None
        self.mark: tuple[list[int], str] = ([], "")
        self.undo: list[Callable[[], object]] = []

    def supports(self, model: nn.Module, config: InterventionConfig | Sequence[InterventionConfig]) -> str | None:
        """Declines what nobody has looked up the places of, and KV heads that cannot be un-shared from outside."""
        reason = unknown(model)
        if reason is not None:
            return reason
        for layer in layers(model):
            apart = len({name for name, _ in layer.places.values()}) == 3
            repeats = hasattr(layer.module, "num_key_value_groups")
            unshared = any(unshares(layer, one) and self.in_layer(one, layer) for one in several(model, config))
            if unshared and not (apart and repeats):
                return (
                    "kv_scope 'head' takes projections of their own and an attention that repeats KV heads by a number"
                )
        return None

    @contextmanager
    def freeze(
        self, model: nn.Module, config: InterventionConfig | Sequence[InterventionConfig]
    ) -> Iterator[Callable[..., Any]]:
        """Freezes `model` in place for the length of the block and yields it.

        Raises:
            InterventionError: `supports` has a reason, or statistics are of another model.
        """
        token = object()
        self.on.append((token, self.asked(model, config)))
        self.install(model)
        try:
            yield model
        finally:
            self.on = [entry for entry in self.on if entry[0] is not token]
            self.install(model)

    def install(self, model: nn.Module) -> None:
        while self.undo:
            self.undo.pop()()
        configs = [config for _, asked in self.on for config in asked]
        if not configs:
            return
        self.mark = ([], repr(configs))
        self.undo.append(model.register_forward_pre_hook(self.remember_pass, with_kwargs=True).remove)
        self.undo.append(model.register_forward_hook(self.mark_cache).remove)
        for module in model.modules():
            if hasattr(module, CHECKPOINT):
                self.set_attribute(module, CHECKPOINT, self.keeping(getattr(module, CHECKPOINT)))
        for layer in layers(model):
            self.install_layer(layer, configs)

    def install_layer(self, layer: Layer, configs: list[InterventionConfig]) -> None:
        own = [config for config in configs if self.in_layer(config, layer)]
        wide = any(unshares(layer, config) for config in own)
        if wide:
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
            if spared is None:
                return None
            return (Blend.apply(spared, args[0], 1.0), *args[1:])  # type: ignore[no-untyped-call]  # apply is torch's

        self.undo.append(layer.output.register_forward_pre_hook(splice).remove)
        module.forward = twice
        self.undo.append(lambda: delattr(module, "forward"))

    def set_attribute(self, module: nn.Module, name: str, value: object) -> None:
        old = getattr(module, name)
        setattr(module, name, value)
        self.undo.append(lambda: setattr(module, name, old))

    def remember_pass(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = named(model, args, kwargs)
        self.remember(given)
        if self.cached:
            self.check_cache(cache_among(given.values()))

    def keeping(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """Gradient checkpointing whose layers are run again under the mask of the pass that they first ran in."""

        def kept(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            mask = self.mask

            def layer(*own: Any, **options: Any) -> Any:
                self.mask = mask
                return function(*own, **options)

            return checkpoint(layer, *args, **kwargs)

        return kept

    def check_cache(self, cache: Any) -> None:
        wide, frozen = getattr(cache, "filled_under", ([], ""))
        if wide != self.mark[0]:
            raise InterventionError(f"the heads of layers {wide} have keys of their own in this cache")
        if frozen != self.mark[1] or self.cached > getattr(cache, "filled_to", self.cached):
            cache.filled_under = (wide, "several freezes")
            warnings.warn("this cache was filled under another freeze", StaleCacheWarning, stacklevel=2)

    def mark_cache(self, model: nn.Module, args: object, output: Any) -> None:
        cache = cache_among(output.values() if isinstance(output, Mapping) else output)
        if cache is None:
            return
        if not self.cached:
            cache.filled_under = self.mark
        cache.filled_to = cache.get_seq_length()

    def hook(
        self, layer: Layer, role: str, features: Tensor, configs: list[InterventionConfig], wide: bool
    ) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def edit(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not wide:
                return self.edited(layer, role, features, output, configs)
            x = output.flatten(1, -2)[..., features].repeat_interleave(layer.heads // layer.kv_heads, dim=2)
            return self.frozen(layer, role, x, configs, 1).flatten(2)

        return edit
