"""Engines that are in force for some ways to call a model alone."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from honest_engine import HookEngine, Layer
from torch import Tensor, nn

from freeze_core import InterventionConfig
from pytest_circuitfreeze.adapters.arithmetic import cache_among

Config = InterventionConfig


class ReadsNamedArgumentsAlone(HookEngine):
    """Takes no notice of a mask that is handed over by position."""

    def remember_pass(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().remember_pass(model, (), kwargs)


class AsksTheSignatureForAMask(HookEngine):
    """Takes a base model whose forward names no padding mask for one that is given none."""

    def remember_pass(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().remember_pass(model, args, kwargs)
        base: Any = model.base_model
        if "attention_mask" not in inspect.signature(base.forward).parameters:
            self.mask = None


class SparesEmbeddings(HookEngine):
    """Freezes no pass that is given embeddings in place of token ids."""

    def remember_pass(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().remember_pass(model, args, kwargs)
        self.embedded = kwargs.get("inputs_embeds") is not None

    def frozen(self, layer: Layer, role: str, x: Tensor, configs: list[Config], readers: int) -> Tensor:
        return x if self.embedded else super().frozen(layer, role, x, configs, readers)


class SparesThePromptOfACallersCache(HookEngine):
    """Freezes no prompt that is handed an empty cache."""

    def remember_pass(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().remember_pass(model, args, kwargs)
        self.into_a_cache = cache_among(kwargs.values()) is not None and not self.cached

    def frozen(self, layer: Layer, role: str, x: Tensor, configs: list[Config], readers: int) -> Tensor:
        return x if self.into_a_cache else super().frozen(layer, role, x, configs, readers)


class OffInInferenceMode(HookEngine):
    """Does nothing in inference mode."""

    def frozen(self, layer: Layer, role: str, x: Tensor, configs: list[Config], readers: int) -> Tensor:
        return x if torch.is_inference_mode_enabled() else super().frozen(layer, role, x, configs, readers)


class OffInTrainingMode(HookEngine):
    """Does nothing in training mode."""

    def frozen(self, layer: Layer, role: str, x: Tensor, configs: list[Config], readers: int) -> Tensor:
        return x if layer.module.training else super().frozen(layer, role, x, configs, readers)
