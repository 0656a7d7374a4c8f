"""What a model must be for the suites to say anything about a freeze of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_circuitfreeze.wrapped import device_of, forward_parameters

if TYPE_CHECKING:
    from torch import nn

__all__ = ["unusable"]


def unusable(model: nn.Module) -> str | None:
    """Why the suites cannot run `model`, and what to do; `None` where they can.

    A model that fails here would fail every claim, for a reason that says nothing about the engine. It runs two tokens.
    """
    frozen = _frozen_modules(model)
    if frozen:
        return (
            f"it is frozen or steered already (the forward of {frozen[0]} is freeze_core's): remove what is installed "
            "on it, and pass the unfrozen model"
        )
    if "input_ids" not in forward_parameters(model):
        taken = ", ".join(forward_parameters(model)) or "nothing"
        return (
            f"it takes no input_ids (its forward takes {taken}), and the suites run token ids: pass a causal language "
            "model, or wrap it in a module that takes input_ids"
        )
    adapter: Any = getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        return (
            f"it is tuned by {adapter.peft_type.value}, whose virtual tokens stand before each prompt, and the suites "
            "count the columns of the prompt alone: pass the model without them (model.get_base_model())"
        )
    return _failing_pass(model)


def _frozen_modules(model: nn.Module) -> list[str]:
    """The paths of the modules that a freeze or a vector of freeze_core is on."""
    from freeze_core.forward_patch import patches_on

    return [name or "the model itself" for name, module in model.named_modules() if patches_on(module)]


def _failing_pass(model: nn.Module) -> str | None:
    import torch

    from pytest_circuitfreeze.strategies import Batch

    batch: Any = Batch(torch.tensor([[1, 2]], device=device_of(model)))
    try:
        with torch.no_grad():
            logits = model(**batch.arguments(model)).logits
    except Exception as error:  # whatever a stranger's model raises
        return f"a pass over two tokens ended in {type(error).__name__}: {error}"
    if logits.shape[:2] != batch.input_ids.shape:
        return (
            f"its logits have the shape {list(logits.shape)} for input_ids of the shape {list(batch.input_ids.shape)}, "
            "and the suites compare them token by token: pass a causal language model"
        )
    return None
