"""TransformerLens: its bridge, built on a copy of the model that shares the parameters, with hooks on q, k and v."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers.modeling_outputs import CausalLMOutputWithPast

from freeze_core import InterventionConfig
from pytest_circuitfreeze.adapters.arithmetic import Arithmetic, beyond_outputs, named
from pytest_circuitfreeze.adapters.places import Layer, layers


class TransformerLensEngine(Arithmetic):
    """Freezes by the bridge's hooks. A bridge takes its model apart for good, so it is given a copy."""

    name = "transformer_lens"
    not_offered: Mapping[str, str] = MappingProxyType(
        {
            "foreign_caches_are_recognised": "nothing marks under what hooks a cache was filled",
            "recomputation_is_the_same_pass": "the bridge's blocks are its own, without transformers' checkpointing",
            "implementations_agree": "the bridge attends by code of its own, whatever implementation is asked for",
        }
    )

    def __init__(self) -> None:
        super().__init__()
        self.bridges: WeakKeyDictionary[nn.Module, TransformerBridge] = WeakKeyDictionary()

    def supports(self, model: nn.Module, config: InterventionConfig | Sequence[InterventionConfig]) -> str | None:
        """Declines models that no bridge can be built of, and what takes more than a hook on q, k and v."""
        reason = beyond_outputs(model, config, "hook_k and hook_v have")
        if reason is not None:
            return reason
        try:
            self.bridge(model)
        except Exception as error:  # whatever a library fails with on a model that it does not know
            return f"no bridge can be built of this {type(model).__name__}: {type(error).__name__}: {error}"
        return None

    @contextmanager
    def freeze(
        self, model: nn.Module, config: InterventionConfig | Sequence[InterventionConfig]
    ) -> Iterator[Callable[..., Any]]:
        """Yields a callable that runs the bridge under hooks.

        Raises:
            InterventionError: `supports` has a reason, or statistics are of another model.
        """
        configs = self.asked(model, config)
        bridge = self.bridge(model)
        hooks = [
            (f"blocks.{layer.number}.attn.hook_{role}", self.hook(layer, role, configs))
            for layer in layers(model)
            for role in layer.places
            if any(self.in_layer(one, layer) for one in configs)
        ]

        with bridge.hooks(fwd_hooks=hooks):
            yield self.unfrozen(model)

    def unfrozen(self, model: nn.Module) -> Callable[..., Any]:
        """A callable that runs the bridge of `model` as the model is called, under the hooks that are on."""
        bridge = self.bridge(model)

        def run(*args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
            arguments = named(model, args, kwargs)
            self.remember(arguments)
            bridge.train(model.training)
            input_ids = arguments.pop("input_ids")
            logits, cache = bridge(input_ids, return_type="logits_and_cache", **arguments)
            return CausalLMOutputWithPast(None, logits, cache)

        # The judge looks there for what runs; the type checker knows no such attribute of a function.
        run.stand_in = bridge.original_model  # type: ignore[attr-defined]
        return run

    def hook(self, layer: Layer, role: str, configs: list[InterventionConfig]) -> Callable[..., Tensor]:
        """A hook on `[batch, token, head, feature]`."""
        own = [one for one in configs if self.in_layer(one, layer)]

        def edit(x: Tensor, hook: object) -> Tensor:
            return self.frozen(layer, role, x, own, layer.heads // x.shape[2])

        return edit

    def bridge(self, model: nn.Module) -> TransformerBridge:
        """The bridge of a copy of a model, built once."""
        if model not in self.bridges:
            twin: Any = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
            twin.config._attn_implementation = "eager"  # as boot_transformers loads one
            self.bridges[model] = build_bridge_from_module(twin, type(model).__name__, hf_config=twin.config)
        return self.bridges[model]
