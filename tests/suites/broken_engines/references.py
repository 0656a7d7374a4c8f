"""Engines that record, or hold, something else than what was recorded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from honest_engine import HookEngine, Layer
from torch import Tensor

from freeze_core import InterventionConfig
from freeze_core.activations import LayerActivations, Recording
from pytest_circuitfreeze.recordings import Recorded, recorded
from pytest_circuitfreeze.strategies import Batch

Config = InterventionConfig


class ColumnBefore(HookEngine):
    """Holds what was recorded one position before."""

    def reference(self, layer: Layer, role: str, x: Tensor, config: Config) -> Tensor:
        return super().reference(layer, role, x, config).roll(1, dims=1)


class LayerBeforeRecorded(HookEngine):
    """Holds what was recorded in the frozen layer before, in its place too."""

    def reference(self, layer: Layer, role: str, x: Tensor, config: Config) -> Tensor:
        assert config.reference is not None
        before = replace(layer, number=max((n for n in config.reference if n < layer.number), default=layer.number))
        return super().reference(before, role, x, config)


class RecordedHeadsInTurn(HookEngine):
    """Gives un-shared heads the recorded KV heads in turn, where neighbours share one."""

    def for_heads(self, values: Tensor, x: Tensor) -> Tensor:
        return values[..., : x.shape[-1]].to(x).repeat_interleave(1, -2).tile(x.shape[2] // values.shape[-2], 1)


class FirstRowForAll(HookEngine):
    """Holds the first recorded row in every row."""

    def reference(self, layer: Layer, role: str, x: Tensor, config: Config) -> Tensor:
        return super().reference(layer, role, x, config)[:1]


class LosesTheStrength(HookEngine):
    """Holds a reference at full strength, whatever was asked for."""

    def blend(self, x: Tensor, r: Tensor, config: Config) -> Tensor:
        whole = Config(backward_mode=config.backward_mode)
        return super().blend(x, r, whole if config.freeze_type == "reference" else config)


class HoldsQueriesAlone(HookEngine):
    """Leaves keys as they are where queries are held at a recording."""

    def roles(self, config: Config) -> str:
        return super().roles(config).replace("k", "") if config.freeze_type == "reference" else super().roles(config)


class RecordsElsewhere(HookEngine):
    """Records what `elsewhere` makes of each activation."""

    def recorded(self, model: Any, source: Batch, *more: Any) -> Recorded:
        right = recorded(model, source, *more)
        layers = {
            layer: LayerActivations(**{name: self.elsewhere(name, getattr(own, name)) for name in "qkvz"})
            for layer, own in right.items()
        }
        return Recorded(Recording(layers, right.attention_mask), source)

    def elsewhere(self, name: str, activation: Tensor) -> Tensor:
        raise NotImplementedError


class RecordsTheColumnBefore(RecordsElsewhere):
    """Records one position too early."""

    def elsewhere(self, name: str, activation: Tensor) -> Tensor:
        return activation.roll(1, dims=1)


class RecordsHeadsBackwards(RecordsElsewhere):
    """Records keys in the wrong order of heads."""

    def elsewhere(self, name: str, activation: Tensor) -> Tensor:
        return activation.flip(2) if name == "k" else activation


class RecordsRoundedValues(RecordsElsewhere):
    """Moves recorded values by one unit in the last place."""

    def elsewhere(self, name: str, activation: Tensor) -> Tensor:
        return torch.nextafter(activation, torch.tensor(torch.inf)) if name == "v" else activation


class RecordsTheOutput(RecordsElsewhere):
    """Records another head's mixed values for a head's."""

    def elsewhere(self, name: str, activation: Tensor) -> Tensor:
        return activation.roll(1, dims=2) if name == "z" else activation


class RecordsNoMask(HookEngine):
    """Forgets under which mask it recorded."""

    def recorded(self, model: Any, source: Batch, *more: Any) -> Recorded:
        return Recorded(Recording(dict(recorded(model, source, *more)), None), source)
