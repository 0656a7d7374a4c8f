"""What decoding under a freeze is held against: one pass over all tokens under the same freeze, without a cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from cache_names import CACHE
from torch import Tensor, nn
from transformers import DynamicCache, QuantizedCache, StaticCache

from freeze_core import AttentionCircuitFreezer, InterventionConfig
from freeze_core.attention.sites import find_sites
from freeze_core.identity import model_identity
from freeze_core.statistics import ActivationStatistics
from pytest_circuitfreeze.suites.tolerance import nudged

FREEZER = AttentionCircuitFreezer()
IDS = torch.arange(24).view(2, 12) * 5 % 97
LEFT = torch.tensor([[0, 0, 0, *[1] * 9], [1] * 12])
"""A mask for `IDS`: the first row is padded on the left."""

CACHES = {
    "dynamic": lambda model: DynamicCache(),
    "dynamic, of the layers' kinds": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=16),
}
PIECES = ((0, 5), (5, 8), (8, 9), (9, 10), (10, 12))
"""What is decoded at a time of `IDS`: chunks, then single tokens."""

KINDS = ("zero", "noise_std", "mean", "noise")
"""The freezes that a cached step can be served under whatever it is part of: no statistics of the pass."""


def config_of(kind: str, model: nn.Module, given: Any = IDS, **fields: Any) -> InterventionConfig:
    """One head of two layers, the layer between them left alone; statistics are those of `model` on `given`."""
    chosen: dict[str, Any] = {"layer_indices": [0, -1], "head_indices": [1], "circuit": "both", "seed": 3, **fields}
    if kind == "noise_std":
        return InterventionConfig(freeze_type="noise", noise_std=1.5, **chosen)
    if kind in ("mean", "noise"):
        chosen["statistics"] = FREEZER.calibrate(model, [given], progress=False)
    return InterventionConfig(freeze_type=kind, **chosen)


@dataclass(frozen=True)
class Recomputed:
    """Logits of one pass, and how far rounding alone could move any of them at a real position."""

    logits: Tensor
    bound: float


def arguments(ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """What decoder-only models are given; positions count real tokens."""
    mask = torch.ones_like(ids) if mask is None else mask
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}


def recomputed(model: Any, config: InterventionConfig, given: dict[str, Any], real: Tensor | None = None) -> Recomputed:
    """The reference for `config` on the arguments `given`, of which the positions `real` count."""
    found, moved = _one_pass(model, config, given), _one_pass(nudged(model), _of(nudged(model), config), given)
    change = (found - moved).abs() if real is None else (found - moved)[real.bool()].abs()
    return Recomputed(found, float(change.max()))


def _one_pass(model: Any, config: InterventionConfig, given: dict[str, Any]) -> Tensor:
    with torch.no_grad(), FREEZER.freeze_circuits(model, config):
        logits: Tensor = model(**given, use_cache=False).logits
    return logits


def _of(model: nn.Module, config: InterventionConfig) -> InterventionConfig:
    """`config` for a nudged copy of the model that its statistics are of."""
    if config.statistics is None:
        return config
    identity = model_identity(find_sites(model, None, "self"))
    return replace(config, statistics=ActivationStatistics(config.statistics, config.statistics.tokens, identity))


def agrees(got: Tensor, want: Tensor, bound: float) -> None:
    """What was decoded is what was recomputed, within `bound`."""
    error = float((got - want).abs().max())
    assert error <= bound, f"off by {error:.3g}, rounding allows {bound:.3g}"


def decode(model: Any, ids: Tensor, mask: Tensor, cache: Any, pieces: Any = PIECES) -> Tensor:
    """Logits of all columns of `ids`, run piece by piece on `cache`."""
    given, found = arguments(ids, mask), []
    with torch.no_grad():
        for start, stop in pieces:
            piece = {name: value[:, start:stop] for name, value in given.items()}
            piece["attention_mask"] = given["attention_mask"][:, :stop]
            found.append(model(**piece, **{CACHE: cache}, use_cache=True).logits)
    return torch.cat(found, dim=1)


def quantised(model: nn.Module) -> QuantizedCache:
    """A coarse cache: 4 bits, but for the latest tokens."""
    return QuantizedCache("quanto", model.config, q_group_size=8, residual_length=4)


def handed_over(model: Any, cache: Any, config: InterventionConfig, ids: Tensor, mask: Tensor) -> Tensor:
    """The keys and values of all columns that each layer hands to its cache, `[layer, 2, batch, head, column, ...]`."""
    layers: dict[int, list[Tensor]] = {}
    update = cache.update

    def spy(keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        layers.setdefault(layer, []).append(torch.stack([keys, values]))
        return update(keys, values, layer, *args, **kwargs)

    cache.update = spy
    length = ids.shape[1]
    with FREEZER.freeze_circuits(model, config):
        decode(
            model,
            ids,
            mask,
            cache,
            ((0, length),)
            if isinstance(cache, DynamicCache)
            else ((0, length - 2), (length - 2, length - 1), (length - 1, length)),
        )
    return torch.stack([torch.cat(layers[layer], dim=3) for layer in sorted(layers)])
