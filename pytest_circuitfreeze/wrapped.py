"""What a model that may be wrapped (by PEFT, `torch.compile` or a module of one's own) is and takes."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["config_of", "device_of", "dtype_of", "forward_parameters", "transformers_configs"]


def config_of(model: nn.Module) -> Any:
    """The transformers config of `model`, or of the outermost module in it that has one.

    Raises:
        AttributeError: no module has one.
    """
    configs = transformers_configs(model)
    if not configs:
        raise AttributeError(f"{type(model).__name__} has no module with a transformers config")
    return configs[0]


def transformers_configs(model: nn.Module) -> list[Any]:
    """The transformers configs of all modules of `model`, outermost first, each once."""
    found = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in found if hasattr(config, "get_text_config")}.values())


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter of `model` is."""
    return next(model.parameters()).device


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of the first floating parameter of `model`: those of quantised layers may be integers."""
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def forward_parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    """The parameters of the forward that takes what `model` is called with.

    A wrapper whose forward is `(*args, **kwargs)` hands them on to a module inside it, whose forward names them.
    """
    first: dict[str, inspect.Parameter] | None = None
    for module in model.modules():
        parameters = dict(inspect.signature(module.forward).parameters)
        first = parameters if first is None else first
        if "input_ids" in parameters:
            return parameters
        if all(one.kind is not inspect.Parameter.VAR_KEYWORD for one in first.values()):
            break
    return first or {}
