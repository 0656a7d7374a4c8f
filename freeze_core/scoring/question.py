"""What a sweep is asked, as short texts: two sweeps whose texts are the same give the same table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from freeze_core.identity import checksums
from freeze_core.scoring.batches import Batch

if TYPE_CHECKING:
    from freeze_core.scoring.metrics import Metric
    from freeze_core.scoring.sweep import Intervention

__all__ = ["Question", "differing", "question_of"]

Question = Mapping[str, str]
"""By the name of each part its text, or a hash of it where that is long."""

VERSIONED = ("pytest-circuitfreeze", "torch", "transformers")


def question_of(
    model: nn.Module,
    batches: Sequence[Batch],
    metric: Metric,
    wanted: Mapping[int, Sequence[Intervention]],
) -> Question:
    """What decides the table of an exact sweep."""
    return {
        "versions": ", ".join(f"{name} {version(name)}" for name in VERSIONED),
        "model's class": f"{type(model).__module__}.{type(model).__qualname__}",
        "model's config": _hashed(_config(model)),
        "model's parameters": _parameters(model),
        "training mode": _hashed([module.training for module in model.modules()]),
        "metric": metric.qualified_name,
        "targets": _hashed(metric.targets),
        "inputs": _hashed([batch.given for batch in batches]),
        "positions": _hashed([batch.positions for batch in batches]),
        "heads, circuits and freezes": _hashed(
            [[(one.heads, *_freeze(one)) for one in several] for several in wanted.values()]
        ),
    }


def differing(one: Question, other: Question) -> str:
    """The parts that differ, with both texts."""
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return "; ".join(f"{name} ({one.get(name)}, and {other.get(name)})" for name in names)


def _config(model: nn.Module) -> str:
    """The model's config but for where it was loaded from, and its attention implementation."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return type(config).__qualname__
    told = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
    attention = getattr(config, "_attn_implementation", None)
    return f"{attention} {json.dumps(told, sort_keys=True, default=_type_name)}"


def _type_name(value: object) -> str:
    return type(value).__qualname__


def _parameters(model: nn.Module) -> str:
    """A hash of all parameters and buffers, and of the checksums of all where some were offloaded."""
    offloaded = any(parameter.is_meta for parameter in model.parameters())
    values = [*model.named_parameters(), *model.named_buffers()]
    return _hashed([*values, *checksums(model)] if offloaded else values)


def _freeze(one: Intervention) -> tuple[object, ...]:
    freeze, treatment = one.freeze, one.freeze.treatment
    reference = treatment.replacement.reference
    recorded = (reference.digest, list(reference.masks.values())) if reference else None
    return freeze.layer, freeze.roles, freeze.heads, str(freeze.scope), treatment.key, recorded


def _hashed(value: object) -> str:
    digest = hashlib.sha256()
    _feed(value, digest.update)
    return digest.hexdigest()[:16]


def _feed(value: object, update: Callable[[Any], None]) -> None:
    """Hands on all that a value consists of: tensors, numbers, texts, and mappings and lists of such."""
    if isinstance(value, Tensor):
        update(f"{value.dtype} {list(value.shape)}".encode())
        if hasattr(value, "__tensor_flatten__"):  # quantised, say
            for name in value.__tensor_flatten__()[0]:
                _feed(getattr(value, name), update)
        elif not value.is_meta:
            update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        _feed(sorted(value.items(), key=str), update)
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes):
        update(b"[")
        for one in value:
            _feed(one, update)
        update(b"]")
    elif value is None or isinstance(value, str | bytes | int | float):
        update(f"{value!r},".encode())
    else:
        update(_type_name(value).encode())
