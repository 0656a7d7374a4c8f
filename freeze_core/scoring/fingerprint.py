"""What decides the table of a sweep, as short texts: two sweeps with the same texts give the same table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from freeze_core.identity import checksums
from freeze_core.scoring.sweep import Intervention, Sweep

__all__ = ["Fingerprint", "describe_differences", "fingerprint_of"]

Fingerprint = Mapping[str, str]
"""By the name of each part its text, or a hash of it where that is long."""

VERSIONED = ("pytest-circuitfreeze", "torch", "transformers")


def fingerprint_of(sweep: Sweep) -> Fingerprint:
    """The fingerprint of an exact sweep. Reads each parameter once."""
    model = sweep.model
    return {
        "versions": ", ".join(f"{name} {version(name)}" for name in VERSIONED),
        "model's class": f"{type(model).__module__}.{type(model).__qualname__}",
        "model's config": _hash(_config(model)),
        "model's parameters": _parameters(model),
        "training mode": _hash([module.training for module in model.modules()]),
        "metric": sweep.metric.qualified_name,
        "targets": _hash(sweep.metric.targets),
        "inputs": _hash([batch.given for batch in sweep.batches]),
        "positions": _hash([batch.positions for batch in sweep.batches]),
        "heads, circuits and freezes": _hash([[_freeze(one) for one in layer] for layer in sweep.wanted.values()]),
    }


def describe_differences(one: Fingerprint, other: Fingerprint) -> str:
    """The parts that differ, with both texts."""
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return "; ".join(f"{name} ({one.get(name)}, and {other.get(name)})" for name in names)


def _config(model: nn.Module) -> str:
    """The attention implementation, and the model's config except where it was loaded from."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return type(config).__qualname__
    fields = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
    text = json.dumps(fields, sort_keys=True, default=lambda value: type(value).__qualname__)
    return f"{getattr(config, '_attn_implementation', None)} {text}"


def _parameters(model: nn.Module) -> str:
    """A hash of all parameters and buffers, and of the checksums of all where some were offloaded."""
    offloaded = any(parameter.is_meta for parameter in model.parameters())
    values = [*model.named_parameters(), *model.named_buffers()]
    return _hash([*values, *checksums(model)] if offloaded else values)


def _freeze(one: Intervention) -> tuple[object, ...]:
    freeze, treatment = one.freeze, one.freeze.treatment
    reference = treatment.replacement.reference
    recorded = (reference.digest, list(reference.masks.values())) if reference else None
    return one.heads, freeze.layer, freeze.roles, freeze.heads, str(freeze.scope), treatment.key, recorded


def _hash(value: object) -> str:
    digest = hashlib.sha256()
    _feed(value, digest.update)
    return digest.hexdigest()[:16]


def _feed(value: object, update: Callable[[Any], None]) -> None:
    """Calls `update` with all that a value consists of: tensors, numbers, texts, and mappings and lists of such."""
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
    else:
        is_plain = value is None or isinstance(value, str | bytes | int | float)
        update((f"{value!r}," if is_plain else type(value).__qualname__).encode())
