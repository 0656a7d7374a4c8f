"""An intervention vector as tensors and facts, as its file holds them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from freeze_core.arguments import is_finite, is_int
from freeze_core.files import parsed
from freeze_core.results.intervals import Resampling
from freeze_core.vectors.effects import SteeringEffects

if TYPE_CHECKING:
    from freeze_core.vectors.vector import InterventionVector

__all__ = ["check_made", "fields_of", "parts_of"]

PLAIN = ("layer", "method", "found", "typical_norm", "threshold", "paired", "prompts")
"""Fields that are facts as they are."""


def parts_of(vector: InterventionVector) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a vector, by name, and all else as text."""
    tensors = {
        "vector": vector.vector,
        "positive": vector.held_out[0],
        "negative": vector.held_out[1],
        "cosines": vector.cosines,
        "losses": vector.losses,
    }
    facts: dict[str, Any] = {name: getattr(vector, name) for name in PLAIN}
    facts |= {"origin": dict(vector.origin), "resampling": vector.resampling.settings, "effects": None}
    if vector.effects:
        made = vector.effects
        tensors |= {f"effects.{name}": getattr(made, name) for name in ("clean", "steered", "controls")}
        facts["effects"] = {"metric": made.metric, "positions": made.positions, "strengths": made.strengths}
    return tensors, {name: json.dumps(fact) for name, fact in facts.items()}


def fields_of(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> dict[str, Any]:
    """The fields of the vector that has these parts.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: one is missing, or no such thing.
    """
    facts = {name: parsed(text) for name, text in texts.items() if name != "format"}
    resampling, told, effects = Resampling(**facts["resampling"]), facts["effects"], None
    if told is not None:
        strengths = tuple(map(float, told["strengths"]))
        clean, steered, controls = (tensors[f"effects.{name}"] for name in ("clean", "steered", "controls"))
        effects = SteeringEffects(told["metric"], told["positions"], strengths, clean, steered, controls, resampling)
    fields = {name: tuple(facts[name]) if name in ("found", "prompts") else facts[name] for name in PLAIN}
    return fields | {
        **{name: tensors[name] for name in ("vector", "cosines", "losses")},
        "held_out": (tensors["positive"], tensors["negative"]),
        "effects": effects,
        "origin": {"model": facts["origin"]["model"], **facts["origin"]},
        "resampling": resampling,
    }


def check_made(made: InterventionVector) -> None:
    """Raises `ValueError` for what no discovery gives."""
    if made.vector.dim() != 1 or not made.vector.is_floating_point() or not bool(made.vector.isfinite().all()):
        raise ValueError("vector is no [hidden] of finite numbers")
    if not is_int(made.layer) or made.layer < 0:
        raise ValueError(f"layer {made.layer}")
    if not is_finite(made.threshold) or not is_finite(made.typical_norm):
        raise ValueError("the threshold, or the norm of the stream, is not a finite number")
    for values in (*made.held_out, made.cosines):
        if values.dtype != torch.float64 or values.dim() != 1 or not len(values) or not bool(values.isfinite().all()):
            raise ValueError("held-out projections, or cosines, are no finite numbers")
    if "identity" not in made.origin or len(made.found) != 2:
        raise ValueError("of no model, or no prompts")
    if made.effects:
        _check_effects(made.effects)


def _check_effects(effects: SteeringEffects) -> None:
    rows = (len(effects.strengths), len(effects.clean))
    if effects.steered.shape != rows or effects.controls.dim() != 3 or effects.controls.shape[::2] != rows:
        raise ValueError("effects are no numbers for each strength and prompt")
    for values in (effects.clean, effects.steered, effects.controls):
        if values.dtype != torch.float64 or not values.numel() or not bool(values.isfinite().all()):
            raise ValueError("effects are no finite numbers")
