"""Recognises gradient checkpointing, whoever put it there, while a layer first runs in it.

A checkpoint runs layers without keeping what their gradient needs, and runs them again in the backward pass. By then
a freeze may have been removed, or another one installed, and gradients would be those of neither model. So the
checkpoints that a frozen module first runs in are looked up, and what they run again is wrapped.

Torch has two kinds. One that is not reentrant packs saved tensors: it is found among the hooks for saved tensors. A
reentrant one is an autograd function that runs layers in its `forward`, where gradients are off: it is found among the
callers. Libraries that bring a checkpoint of their own (fairscale, DeepSpeed, Megatron) have an autograd function, too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from freeze_core.errors import FreezeNotInForceError

__all__ = ["checkpoints", "may_be_checkpointed"]

# A method of the class, which the type checker takes for a function of its own kind.
APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
"""What stands above the `forward` of every autograd function in the stack of calls."""


def may_be_checkpointed(differentiated: bool) -> bool:
    """Whether what runs now may be in a checkpoint: a cheap test, for every run of every frozen module.

    Args:
        differentiated: whether gradients were on where the caller began to look.
    """
    if differentiated and not torch.is_grad_enabled():
        return True
    return not torch.compiler.is_compiling() and _top_hooks() is not None


def checkpoints(what: str) -> Iterator[tuple[Any, str]]:
    """The checkpoints that the caller runs in, each with its attribute that is called to run layers again.

    Raises:
        FreezeNotInForceError: `what` runs in an autograd function of another make: whether it is a checkpoint, and what
            it would call again, is unknown.
    """
    for pack, _ in _all_hooks():
        if getattr(pack, "__module__", "") == torch.utils.checkpoint.__name__:
            cells = dict(zip(pack.__code__.co_freevars, pack.__closure__ or (), strict=True))
            if "frame" in cells:  # the hooks of a recomputation have none
                yield cells["frame"].cell_contents, "recompute_fn"
    if torch.is_grad_enabled():
        return
    for forward, apply in _functions_above(sys._getframe()):
        code = forward.f_code
        context = forward.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if hasattr(context, "run_function"):
            yield context, "run_function"
        elif any(isinstance(one, Tensor) and one.requires_grad for one in apply.f_locals["args"]):
            raise FreezeNotInForceError(
                f"{what} is frozen and runs inside of the autograd function {apply.f_locals['cls'].__name__}, which "
                "may run it again in the backward pass, in a way that is unknown: use torch.utils.checkpoint instead"
            )


def _top_hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def _all_hooks() -> list[tuple[Any, Any]]:
    """The hooks for saved tensors, innermost first. Torch shows the topmost only: the others are bared and put back."""
    hooks = []
    try:
        while (top := _top_hooks()) is not None:
            hooks.append(top)
            torch._C._autograd._pop_saved_tensors_default_hooks()
    finally:
        for pack, unpack in reversed(hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)
    return hooks


def _functions_above(frame: FrameType | None) -> Iterator[tuple[FrameType, FrameType]]:
    """The calls of autograd functions among the callers of `frame`: their `forward`, and their `apply` above it."""
    while frame is not None and frame.f_back is not None:
        if frame.f_back.f_code is APPLY:
            yield frame, frame.f_back
        frame = frame.f_back
