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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from freeze_core.errors import FreezeNotInForceError
from freeze_core.forward_patch import patch_on

if TYPE_CHECKING:
    from freeze_core.freezing.pass_tracker import PassTracker
    from freeze_core.freezing.passes import Pass

__all__ = ["follow", "may_be_checkpointed", "wrap_checkpoints", "wrapped_functions"]

SHOWS_HOOKS = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
"""Whether this torch shows the hooks for saved tensors: 2.6 does not."""

APPLY: Any = getattr(getattr(torch.autograd.Function.apply, "__func__", None), "__code__", None)
"""What calls the `forward` of an autograd function, where that is Python: before torch 2.15."""


def follow(tracker: PassTracker) -> bool:
    """Wraps the checkpoints that a frozen module runs in; called at each of its runs.

    Returns:
        whether one of them was not known yet.
    """
    running = tracker.current
    began = running.differentiated if running else not torch.compiler.is_compiling()
    return may_be_checkpointed(began) and bool(wrap_checkpoints(tracker, running))


# Not compiled: a compiled layer in what may be a reentrant checkpoint stops here and looks around. The public
# torch.compiler.disable would import all of torch._dynamo with this library.
@torch._disable_dynamo  # type: ignore[attr-defined]
def wrap_checkpoints(tracker: PassTracker, running: Pass | None) -> bool:
    """Wraps the checkpoints that the caller runs in, so that what they run again runs as it first did.

    Returns:
        whether one of them was not known yet.
    """
    new = False
    for checkpoint, attribute in _checkpoints(type(tracker.module).__name__):
        trackers = vars(checkpoint).setdefault("_circuitfreeze", [])
        if tracker not in trackers:
            trackers.append(tracker)
            setattr(checkpoint, attribute, _run_again(tracker, running, getattr(checkpoint, attribute)))
            new = True
    return new


@contextmanager
def wrapped_functions(tracker: PassTracker, running: Pass) -> Iterator[None]:
    """Wraps what layers that transformers or torch's wrappers checkpoint run again, before they run.

    `follow` does so for every checkpoint, but not where a layer is compiled: nothing looks around in there.
    """
    originals = [
        (module, name, vars(module)[name])
        for module in tracker.module.modules()
        for name in ("_gradient_checkpointing_func", "checkpoint_fn")
        if name in vars(module) and callable(vars(module)[name])
    ]
    for module, name, original in originals:
        setattr(module, name, _wrapping(tracker, running, original))
    try:
        yield
    finally:
        for module, name, original in originals:
            setattr(module, name, original)


def _wrapping(tracker: PassTracker, running: Pass, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    def checkpointing(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return checkpoint(_run_again(tracker, running, function), *args, **kwargs)

    return checkpointing


def _run_again(first: PassTracker, running: Pass | None, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which runs in the pass `running` now and when it is called again, under these freezes only."""
    treatments, runs = first.treatments(), running.runs_so_far() if running else None
    masks = first.composite.masks if first.composite else []

    def again(*args: Any, **kwargs: Any) -> Any:
        # The same freeze may have been removed and installed anew meanwhile.
        tracker = first if first.treatments() else patch_on(first.module, type(first)) or first
        if tracker.treatments() != treatments:
            raise FreezeNotInForceError(
                "gradient checkpointing runs a layer again under other freezes than it first ran under: call backward "
                "while the same freezes are live, inside the same `with`"
            )
        if running and runs:
            running.go_back(runs)  # run again, it is the same run
        with _recomputing(tracker, masks):
            return tracker.run_in(running, function, args, kwargs)

    return again


@contextmanager
def _recomputing(tracker: PassTracker, masks: list[Any]) -> Iterator[None]:
    """Within this, layers run again for a pass whose module around the stack was given `masks`."""
    composite = tracker.composite
    before = tracker.recomputing, composite.masks if composite else []
    tracker.recomputing = True
    if composite:
        composite.masks = masks
    try:
        yield
    finally:
        tracker.recomputing = before[0]
        if composite:
            composite.masks = before[1]


def may_be_checkpointed(differentiated: bool) -> bool:
    """Whether what runs now may be in a checkpoint: a cheap test, for every run of every frozen module.

    Args:
        differentiated: whether gradients were on where the caller began to look.
    """
    if differentiated and not torch.is_grad_enabled():
        return True
    if torch.compiler.is_compiling():
        return False
    return _top_hooks() is not None if SHOWS_HOOKS else torch.is_grad_enabled()


def _checkpoints(what: str) -> Iterator[tuple[Any, str]]:
    """The checkpoints that the caller runs in, each with its attribute that is called to run layers again.

    Raises:
        FreezeNotInForceError: `what` runs in an autograd function of another make: whether it is a checkpoint, and what
            it would call again, is unknown.
    """
    for checkpoint in _hooked_checkpoints() if SHOWS_HOOKS else _running_checkpoints(sys._getframe()):
        yield checkpoint, "recompute_fn"
    if torch.is_grad_enabled():
        return
    for context, name, differentiated in _autograd_functions(sys._getframe()):
        if hasattr(context, "run_function"):
            yield context, "run_function"
        elif differentiated:
            raise FreezeNotInForceError(
                f"{what} is frozen and runs inside of the autograd function {name}, which may run it again in the "
                "backward pass, in a way that is unknown: use torch.utils.checkpoint instead"
            )


def _hooked_checkpoints() -> Iterator[Any]:
    """The checkpoints whose hooks saved tensors are packed by."""
    for pack, _ in _all_hooks():
        if getattr(pack, "__module__", "") == torch.utils.checkpoint.__name__:
            cells = dict(zip(pack.__code__.co_freevars, pack.__closure__ or (), strict=True))
            if "frame" in cells:  # the hooks of a recomputation have none
                yield cells["frame"].cell_contents


def _running_checkpoints(frame: FrameType | None) -> Iterator[Any]:
    """The same for torch 2.6, which does not show the hooks: those of `checkpoint` calls among the callers of `frame`.

    A checkpoint that a library begins in one hook and ends in another (torch's composable one) is not found there.
    """
    while frame is not None:
        if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
            generator = frame.f_locals.get("gen")
            running = getattr(generator, "gi_frame", None)
            checkpoint = running.f_locals.get("new_frame") if running else None
            if checkpoint is not None:
                yield checkpoint
        frame = frame.f_back


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


def _autograd_functions(frame: FrameType | None) -> Iterator[tuple[Any, str, bool]]:
    """The autograd functions among the callers of `frame`: context, name, and whether an input requires a gradient.

    One whose `forward` takes no context is found before torch 2.15 alone.
    """
    while frame is not None:
        code, caller = frame.f_code, frame.f_back
        if code.co_name == "forward" and code.co_argcount:
            context = frame.f_locals.get(code.co_varnames[0])
            if isinstance(context, torch.autograd.function.BackwardCFunction):
                yield context, type(context).__name__.removesuffix("Backward"), any(context.needs_input_grad)
            elif caller is not None and caller.f_code is APPLY:
                inputs = caller.f_locals["args"]
                differentiated = any(isinstance(value, Tensor) and value.requires_grad for value in inputs)
                yield None, caller.f_locals["cls"].__name__, differentiated
        frame = caller
