"""What every running condition is held against: the same freeze of the same weights, in float32 under eager attention.

`agrees` also asks that leaving the freeze out would show: the frozen logits must be further from the unfrozen ones,
under the very same condition, than rounding could bring them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from freeze_core import AttentionCircuitFreezer, InterventionConfig
from pytest_circuitfreeze.models import tiny_model
from pytest_circuitfreeze.suites.tolerance import nudged

FREEZER = AttentionCircuitFreezer()
IDS = torch.arange(14).view(2, 7) * 5 % 97
OTHER_IDS = IDS.flip(0) * 3 % 97

FREEZE_TYPES = ("zero", "mean", "noise", "noise_std", "reference", "resample")
"""Every freeze type, noise with and without statistics of the pass."""


def config_of(freeze_type: str, model: nn.Module, **fields: Any) -> InterventionConfig:
    """One head of two layers, the layer between them left alone."""
    chosen: dict[str, Any] = {"layer_indices": [0, -1], "head_indices": [1], "circuit": "both", "seed": 3}
    if freeze_type == "noise_std":
        return InterventionConfig(**{**chosen, "freeze_type": "noise", "noise_std": 1.5, **fields})
    if freeze_type == "reference":
        chosen["reference"] = FREEZER.record(model, OTHER_IDS)
    return InterventionConfig(**{**chosen, "freeze_type": freeze_type, **fields})


def logits(model: Callable[..., Any], **arguments: Any) -> Tensor:
    """What the model says of `IDS`, `[batch, token, vocabulary]`, without a cache and without gradients."""
    with torch.no_grad():
        output: Tensor = model(input_ids=IDS, use_cache=False, **arguments).logits
    return output


def frozen_logits(model: nn.Module, config: InterventionConfig, call: Callable[[], Tensor] | None = None) -> Tensor:
    """The same under a freeze that is on for this one call; `call` runs the model in its own way."""
    with FREEZER.freeze_circuits(model, config):
        return (call or (lambda: logits(model)))()


@dataclass(frozen=True)
class Plain:
    """Frozen logits of the plain model, and how far rounding alone could move any of them."""

    frozen: Tensor
    bound: float


def plain_freeze(model: nn.Module, config: InterventionConfig, rounding: torch.dtype = torch.float32) -> Plain:
    """The reference for `config`: `model` in float32 under eager attention; `rounding` is the condition's dtype."""
    eager = as_eager(model)
    frozen = frozen_logits(eager, config)
    moved = frozen_logits(nudged(eager, rounding), config)
    return Plain(frozen, float((moved - frozen).abs().max()))


def as_eager(model: Any) -> Any:
    """`model`, which must be in float32, under eager attention."""
    assert model.dtype == torch.float32
    model.config._attn_implementation = "eager"
    return model


def plain(
    name: str, freeze_type: str, rounding: torch.dtype = torch.float32, **fields: Any
) -> tuple[InterventionConfig, Plain]:
    """A config for the tiny model `name`, and its reference."""
    model = tiny_model(name, attn="eager")
    config = config_of(freeze_type, model, **fields)
    return config, plain_freeze(model, config, rounding)


def agrees(got: Tensor, unfrozen: Tensor, wanted: Plain) -> None:
    """The frozen logits are those of the plain freeze, and are none that the model gives without it."""
    assert not torch.is_grad_enabled() or not got.requires_grad
    error = float((got.float() - wanted.frozen).abs().max())
    effect = float((got.float() - unfrozen.float()).abs().max())
    assert error <= wanted.bound, f"off by {error:.3g}, rounding allows {wanted.bound:.3g}"
    assert effect > 2 * wanted.bound, f"the freeze moves logits by {effect:.3g} only, rounding by {wanted.bound:.3g}"


OWN_FEATURES = {
    "gpt2": {"attn.c_attn": (8, 40, 72)},
    "llama_gqa": {"self_attn.q_proj": (8,), "self_attn.k_proj": (0,), "self_attn.v_proj": (0,)},
    "falcon_mqa": {"self_attention.query_key_value": (8, 32, 40)},
}
"""Where query head 1 and the KV head that it reads begin in the projections' outputs; each has 8 features."""


def without_heads(name: str, model: Any) -> Any:
    """The tiny model `name` with the weights zero that make what `config_of("zero", model)` holds at zero.

    What it gives is what the freeze must give bit for bit, in any dtype and under any condition: a sum of zeros is zero
    and no other feature has changed.
    """
    layers = model.base_model.h if hasattr(model.base_model, "h") else model.base_model.layers
    with torch.no_grad():
        for layer in (layers[0], layers[-1]):
            for path, starts in OWN_FEATURES[name].items():
                projection = layer.get_submodule(path)
                along = -1 if type(projection).__name__ == "Conv1D" else 0
                for start in starts:
                    projection.weight.narrow(along, start, 8).zero_()
                    if projection.bias is not None:
                        projection.bias.narrow(0, start, 8).zero_()
    return model
