"""Engines that read layers and heads otherwise than they are named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from honest_engine import HookEngine
from torch import nn

from freeze_core import InterventionConfig

Config = InterventionConfig


class CountsFromTheFrontAlone(HookEngine):
    """Takes a negative head for the positive one: -1 is head 1."""

    def asked(self, model: nn.Module, config: Config | Sequence[Config]) -> list[Config]:
        given = [config] if isinstance(config, Config) else [*config]
        heads: Any = model.config
        return super().asked(model, [self.counted(one, heads.num_attention_heads) for one in given])

    def counted(self, config: Config, heads: int) -> Config:
        if config.head_indices is None:
            return config
        return replace(config, head_indices=sorted({abs(head) % heads for head in config.head_indices}))


class AllLayersButTheLast(HookEngine):
    """Takes no layers named for all but the last one."""

    def asked(self, model: nn.Module, config: Config | Sequence[Config]) -> list[Config]:
        given = [config] if isinstance(config, Config) else [*config]
        sizes: Any = model.config
        every = [*range(sizes.num_hidden_layers - 1)]
        return super().asked(
            model, [replace(one, layer_indices=every) if one.layer_indices is None else one for one in given]
        )


class FirstHeadForAll(HookEngine):
    """Takes no heads named for the first one."""

    def asked(self, model: nn.Module, config: Config | Sequence[Config]) -> list[Config]:
        given = [config] if isinstance(config, Config) else [*config]
        return super().asked(
            model, [replace(one, head_indices=[0]) if one.head_indices is None else one for one in given]
        )
