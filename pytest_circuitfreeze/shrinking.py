"""A tiny model of any causal language model type that the installed transformers has.

Nothing here knows a family by heart: a type's configuration class is asked for its defaults, and every field is made
small by its name and by how it relates to the others. So a type that is released tomorrow is tried without new code;
what no rule could know is a line of `shrinking_rules`. `python -m pytest_circuitfreeze.shrinking` tries every type.

Importing this module imports neither torch nor transformers.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_circuitfreeze.shrinking_draws import SHARPNESS, draw
from pytest_circuitfreeze.shrinking_rules import (
    AT_MOST,
    DROPOUT,
    EXCEPTIONS,
    HEAD_DIM,
    HEADS,
    LAYER_COUNT,
    LAYERS,
    MOST_LAYERS,
    ROTARY,
    ROTARY_DIM,
    SET,
    SOFTER,
)

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


def causal_lm_types() -> list[str]:
    """The causal language model types of the installed transformers, sorted: `["afmoe", "apertus", ...]`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def shrunken_config(model_type: str, fields: Mapping[str, object] | None = None) -> PretrainedConfig:
    """The configuration of a tiny `model_type`: 3 layers, 4 query heads of 8 features, 2 KV heads, 97 tokens.

    It has that many KV heads where the type lets them be fewer than the query heads, and a fourth layer where it takes
    one to hold every kind of layer. A new object each time.

    Raises:
        ValueError: transformers has no causal language model of that type, or its configuration class refuses.
    """
    if model_type not in causal_lm_types():
        known = ", ".join(causal_lm_types())
        raise ValueError(f"transformers has no causal language model type {model_type!r}; it has {known}")
    try:
        default = _config_class(model_type)()
        config = type(default)(**{**_small_fields(default), **(fields or {})})
        if not hasattr(config, "pad_token_id"):  # some models of transformers 5.0 read what their configs lack
            config.pad_token_id = None
        return config
    except Exception as error:
        raise ValueError(_cannot(model_type, "be configured", error)) from error


def tiny_of_type(
    model_type: str,
    *,
    fields: Mapping[str, object] | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    attn: str | None = "sdpa",
) -> PreTrainedModel:
    """Builds a tiny model of `model_type` with every parameter drawn from `seed`, in eval mode.

    Args:
        model_type: one of `causal_lm_types()`.
        fields: of its config, where they are not to be what shrinking makes them.
        seed: weights are a function of type and seed alone; torch's own generators are left as they are.
        dtype: of the parameters, float32 by default. The same draws, rounded, in every dtype.
        device: where the model is put.
        attn: attention implementation, `"eager"` or `"sdpa"`; `None` is the latter where the class has it.

    Raises:
        ValueError: no such type, or its model cannot be built (under `attn`, perhaps) or cannot run on token ids
            alone, with transformers' reason.

    >>> tiny_of_type("qwen2").config.num_key_value_heads
    2
    """
    config = shrunken_config(model_type, fields)
    import torch

    if hasattr(type(config), "_experts_implementation"):
        # The plain loop over experts serves every dtype; the grouped product does not.
        config._experts_implementation = "eager"
    model_class = _model_class(model_type)
    if attn is None:
        attn = "sdpa" if getattr(model_class, "_supports_sdpa", False) else "eager"
    try:
        # What the class draws (decays, buffers) is a function of the seed as well; it does so on the CPU.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model: PreTrainedModel = model_class._from_config(config, attn_implementation=attn)
    except Exception as error:
        raise ValueError(_cannot(model_type, f"be built with attention {attn!r}", error)) from error
    draw(model, seed, SOFTER.get(model_type, SHARPNESS))
    model = model.to(device=device, dtype=dtype or torch.float32).eval()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            model(torch.ones(1, 2, dtype=torch.long, device=device))
    except Exception as error:
        raise ValueError(_cannot(model_type, "run on token ids alone", error)) from error
    return model


def _cannot(model_type: str, what: str, error: Exception) -> str:
    reason = " ".join(str(error).split())
    return f"a tiny model of type {model_type!r} cannot {what}: {type(error).__name__}: {reason}"


def _config_class(model_type: str) -> Any:
    """The configuration class that the model is built from: a decoder's own, say, where the type is a larger whole."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    whole, own = CONFIG_MAPPING[model_type], _model_class(model_type).config_class
    return whole if own is None or issubclass(whole, own) else own


def _model_class(model_type: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    found = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
    return found[0] if isinstance(found, (list, tuple)) else found


def _small_fields(config: PretrainedConfig) -> dict[str, Any]:
    """What `config`'s class is built from, made small; a configuration inside it as a mapping.

    Only what differs from the class's own defaults: what the class works out from other fields is left to it.
    """
    names = inspect.signature(type(config)).parameters
    fields = {name: vars(config).get(config.attribute_map.get(name, name)) for name in names}
    layers = _Layers.chosen_from(fields, getattr(config, "num_hidden_layers", None))
    small = {name: _small(name, value, layers) for name, value in fields.items()} | _latent_attention(fields)
    defaults = vars(type(config)())
    changed = {
        name: value for name, value in small.items() if value != defaults.get(config.attribute_map.get(name, name))
    }
    for name, value in EXCEPTIONS.get(config.model_type, {}).items():
        changed[name] = {**(changed.get(name) or {}), **value} if isinstance(value, Mapping) else value
    return changed


def _small(name: str, value: Any, layers: _Layers) -> Any:
    """The small value of the field `name`; `value` itself where there is nothing to do."""
    if hasattr(value, "to_dict"):
        return {"model_type": value.model_type, **_small_fields(value)}
    if name in ("rope_parameters", "rope_scaling") and isinstance(value, Mapping):
        return _small_rotary(value)
    if isinstance(value, (list, tuple)):
        return [_small_number(name, each, layers) for each in layers.of(value)]
    return _small_number(name, value, layers)


def _small_number(name: str, value: Any, layers: _Layers) -> Any:
    name = name.removesuffix("_per_layer")
    if re.fullmatch(DROPOUT, name):
        return type(value)(0) if value else value
    if "partial_rotary" in name or name in ("rotary_pct", "rope_pct"):
        return _small_rotary_share(value)
    if re.fullmatch(LAYER_COUNT, name):
        return len(layers.kept) or LAYERS
    for pattern, fixed in SET:
        if re.fullmatch(pattern, name):
            return fixed
    if type(value) is int:
        for pattern, most in AT_MOST:
            if re.fullmatch(pattern, name):
                return min(value, most)
    return value


def _latent_attention(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What multi-head latent attention (MLA) asks of its sizes: a KV head a query head, and rotary parts."""
    if not isinstance(fields.get("kv_lora_rank"), int):
        return {}
    sizes = {
        "num_key_value_heads": HEADS,
        "qk_rope_head_dim": ROTARY_DIM,
        "qk_head_dim": HEAD_DIM + ROTARY_DIM,
        "head_dim": ROTARY_DIM,
    }
    return {name: size for name, size in sizes.items() if name in fields}


def _small_rotary(rotary: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters, or one set of them for each kind of layer, for heads of few features."""
    share = _small_rotary_share(rotary.get("partial_rotary_factor", 1.0))
    pairs = int(HEAD_DIM * share) // 2
    small: dict[str, Any] = {}
    for name, value in rotary.items():
        if isinstance(value, Mapping):
            small[name] = _small_rotary(value)
        elif name == "partial_rotary_factor":
            small[name] = share
        elif name == "mrope_section":
            # The sections, of time, height and width, share out all pairs.
            small[name] = [pairs // len(value) + (i < pairs % len(value)) for i in range(len(value))]
        elif name in ("long_factor", "short_factor"):
            small[name] = value[:pairs]
        else:
            small[name] = min(value, ROTARY[name]) if name in ROTARY else value
    return small


def _small_rotary_share(share: Any) -> Any:
    """A share of a head's features that is two pairs of them at least, so that rotation is more than one angle."""
    return max(share, ROTARY_DIM / HEAD_DIM) if isinstance(share, float) else share


@dataclass(frozen=True)
class _Layers:
    """Which of the default's `total` layers the tiny model has; `total` is None where a configuration has no layers."""

    total: int | None
    kept: tuple[int, ...]

    @classmethod
    def chosen_from(cls, fields: Mapping[str, Any], total: object) -> _Layers:
        """Keeps the first layer of each kind that the fields tell apart, and the first ones up to `LAYERS`.

        Where the default has fewer layers than that, they come round again.
        """
        if type(total) is not int:
            return cls(None, ())
        tells = [value for value in fields.values() if _is_by_layer(value, total)]
        first = {(i, str(kind)): at for i, kinds in enumerate(tells) for at, kind in reversed([*enumerate(kinds)])}
        kept = sorted(set(first.values()))[:MOST_LAYERS]
        kept += [at for at in range(max(total, LAYERS)) if at not in kept][: max(LAYERS - len(kept), 0)]
        return cls(total, tuple(sorted(kept)))

    def of(self, value: Sequence[Any]) -> Sequence[Any]:
        """The part of a list that speaks of the kept layers; `value` itself where it does not go by layers."""
        if self.total is None or not value:
            return value
        if _is_by_layer(value, self.total):
            return [value[at % self.total] for at in self.kept]
        if _counts_layers(value, self.total):
            return [new for new, old in enumerate(self.kept) if old in value]
        return value


def _is_by_layer(value: object, total: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == total and not _counts_layers(value, total)


def _counts_layers(value: Sequence[Any], total: int) -> bool:
    """Whether a list gives numbers of layers, as `[3, 7, 11]` does, in place of saying something of each."""
    return all(type(at) is int and 0 <= at < total for at in value) and sorted(set(value)) == list(value)


def _census(attn: str) -> None:
    """Prints what becomes of each type: its sizes and the seconds it took, or why it cannot be had."""
    import time

    built = 0
    for model_type in causal_lm_types():
        start = time.perf_counter()
        try:
            model = tiny_of_type(model_type, attn=attn)
        except ValueError as error:
            print(f"{model_type:28}{str(error).partition(': ')[2][:160]}")
            continue
        built += 1
        size, seconds = sum(parameter.numel() for parameter in model.parameters()), time.perf_counter() - start
        print(f"{model_type:28}{size:9,} parameters {seconds:6.2f} s")
    print(f"{built} of {len(causal_lm_types())} with attention {attn!r}")


if __name__ == "__main__":
    import sys

    _census(sys.argv[1] if len(sys.argv) > 1 else "eager")
