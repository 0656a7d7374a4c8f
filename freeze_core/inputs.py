"""How a model is called and what it gives back, whatever the family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from freeze_core.errors import CircuitFreezeError, InterventionError, shown, with_newer_versions

__all__ = ["logits_of", "model_arguments", "run", "vocabulary_size"]


def model_arguments(model: nn.Module, inputs: Tensor | Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for one whole forward pass of `model`, without a cache.

    Args:
        inputs: token ids `[batch, token]` (integer), embeddings `[batch, token, hidden]` (floating), or a mapping
            of the model's own arguments, which is passed on as it is.

    Raises:
        InterventionError: anything else.
    """
    if isinstance(inputs, Mapping):
        if not inputs or not all(isinstance(name, str) for name in inputs):
            raise InterventionError(f"inputs={shown(inputs)}: must name the model's arguments, input_ids at least")
        return dict(inputs)
    if not isinstance(inputs, Tensor):
        raise InterventionError(f"inputs is a {type(inputs).__name__}: must be a tensor or a dict of model arguments")
    whole: dict[str, Any] = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    if inputs.numel() == 0:
        raise InterventionError(f"inputs is {list(inputs.shape)}: there must be at least one row of one token")
    if inputs.dim() == 2 and inputs.dtype in (torch.int32, torch.int64):
        return {"input_ids": inputs, **whole}
    if inputs.dim() == 3 and inputs.is_floating_point():
        return {"inputs_embeds": inputs, **whole}
    raise InterventionError(
        f"inputs is {inputs.dtype} {list(inputs.shape)}: must be token ids [batch, token] (integer) or embeddings "
        "[batch, token, hidden] (floating)"
    )


def run(model: nn.Module, arguments: Mapping[str, Any]) -> Any:
    """Runs the model; what it raises over its arguments is told as an `InterventionError`, with its own reason.

    Raises:
        InterventionError: the model does not take such arguments.
    """
    try:
        return model(**arguments)
    except (CircuitFreezeError, torch.OutOfMemoryError):
        raise
    except (TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
        given = {name: list(value.shape) if isinstance(value, Tensor) else value for name, value in arguments.items()}
        message = f"{type(model).__name__} cannot run on {shown(given)}: {error}"
        raise InterventionError(with_newer_versions(message)) from error


def logits_of(output: Any) -> Tensor:
    """The logits `[batch, token, vocabulary]` of a model's output, or its last hidden state where it has no head."""
    for name in ("logits", "last_hidden_state"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    first = output[0] if isinstance(output, tuple | list) and output else output
    if isinstance(first, Tensor):
        return first
    raise InterventionError(f"the model returned a {type(output).__name__} without logits or a last hidden state")


def vocabulary_size(model: nn.Module) -> int | None:
    """The size of the vocabulary, where the config tells it."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    words = getattr(text, "vocab_size", None)
    return words if isinstance(words, int) else None
