"""The checks that notice a freeze without effect, and what they say.

A freeze is a patch on modules of somebody else's model. Whoever replaces or wraps such a module, calls it otherwise
than the model does, or runs it again later may leave a model that looks frozen and is not. Each function here is one
such situation, and raises. They are called by `pass_tracker`, `frozen_modules` and `layer_patch`, where it is also said
when they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from freeze_core.errors import FreezeNotInForceError, InterventionError
from freeze_core.forward_patch import ForwardPatch
from freeze_core.freezing.attention_state import StateWatch
from freeze_core.freezing.caches import filled
from freeze_core.freezing.module_path import ModulePath
from freeze_core.freezing.pass_arguments import caches_in, holds_tensors
from freeze_core.freezing.passes import Pass

__all__ = [
    "CONTINUOUS_BATCHING",
    "cache_buffers",
    "check_paths",
    "refuse_bypass",
    "refuse_foreign_recomputation",
    "refuse_kept_tokens",
    "refuse_lost_projection",
    "refuse_miscount",
    "refuse_recomputed_tokens",
    "refuse_run_outside_of_a_pass",
    "refuse_unfrozen",
    "refuse_written_buffers",
]

CONTINUOUS_BATCHING = (
    "continuous batching (generate_batch) runs parts of several sequences in one row, on pages that may be filled "
    "without this freeze: their columns, statistics and heads cannot be told; use generate()"
)


def refuse_foreign_recomputation(what: str, recomputing: bool) -> None:
    """Raises where `what` runs again for the gradient of a pass that ran without the freezes that are live now.

    Args:
        recomputing: whether it runs again in the pass that it first ran in, under the same freezes.
    """
    if torch._C._current_graph_task_id() != -1 and not recomputing:
        raise FreezeNotInForceError(
            f"{what} is run again for its gradient, and its pass ran without this freeze: call backward before the "
            "freeze is installed"
        )


def refuse_run_outside_of_a_pass(name: str, stack: nn.Module, arguments: Sequence[Any]) -> None:
    """Raises where a frozen layer is run by itself with a cache, of which the pass would tell whether it is stale."""
    if any(True for _ in caches_in(arguments)):
        raise FreezeNotInForceError(
            f"{name} is run with a cache, outside of the {type(stack).__name__} through which it was frozen, so that "
            "it cannot be told whether what is cached is frozen alike: freeze it through the model that runs it, or "
            "run it without a cache (use_cache=False)"
        )


def check_paths(paths: Mapping[str, ModulePath], stack: nn.Module) -> list[str]:
    """The frozen layers on which, or around which, something was put since: it may well run them, or it may not.

    Raises:
        FreezeNotInForceError: another module is there now.
    """
    covered = []
    for name, path in paths.items():
        if path.lost():
            raise FreezeNotInForceError(_replaced(name, stack))
        if path.covered():
            covered.append(name)
    return covered


def refuse_unfrozen(covered: Sequence[str], stack: nn.Module, running: Pass) -> None:
    """Raises where one of the layers that `check_paths` gave did not run in the pass that is over."""
    for name in covered:
        if name not in running.ran:
            raise FreezeNotInForceError(_replaced(name, stack))


def _replaced(name: str, stack: nn.Module) -> str:
    return (
        f"{name} of {type(stack).__name__} was wrapped or replaced after the freeze, so that what runs is not frozen: "
        "remove the freeze, then freeze what is there now"
    )


def refuse_lost_projection(attention: str, patch: ForwardPatch, path: ModulePath) -> None:
    """Raises where attention no longer runs a projection that is frozen."""
    if patch.lost():
        raise FreezeNotInForceError(
            f"{path.path} of {attention} runs its own forward again, which something else has put back after the "
            "freeze (an offloading undone, say): remove the freeze, then freeze the model anew"
        )
    if path.lost():
        raise FreezeNotInForceError(
            f"{path.path} of {attention} was wrapped or replaced after the freeze, so that what attention reads is not "
            "what is held: remove the freeze, then freeze what is there now"
        )


def refuse_miscount(attention: str, module: nn.Module, path: ModulePath, runs: int, may_be_cached: bool) -> None:
    """Raises where a frozen projection did not run exactly once in a run of its attention.

    Args:
        may_be_cached: whether what it gives was taken from a cache, which was filled under the same freezes.
    """
    if runs > 1:
        raise FreezeNotInForceError(
            f"{attention} ran its {path.path} {runs} times in one pass, so that an activation is not one: its layout "
            "is not what it was taken for"
        )
    if runs == 0 and not may_be_cached:
        raise FreezeNotInForceError(
            f"{attention} ran without its {type(module).__name__} that holds frozen activations: this attention does "
            "not call its projections, so the freeze had no effect"
        )


def refuse_bypass(
    attention: str, module: nn.Module, projection: str, running: Pass, clean_backward: bool, differs_by_run: bool
) -> None:
    """Raises where a projection runs in a pass, its attention's patch did not, and what that does is needed.

    That is where the attention's class is called with the module, or a forward that was taken from it earlier. Values
    are frozen all the same; the second run for a gradient and the count of runs in a pass are missing.

    Args:
        clean_backward: whether the gradient is that of the attention without the freeze.
        differs_by_run: whether each run of the attention in a pass has values of its own.
    """
    key = f"{attention}.{projection}"
    again = running.runs.get(key, 0)
    running.runs[key] = again + 1
    if clean_backward and torch.is_grad_enabled():
        needed = "backward_mode='circuit_ste' runs the attention twice for its gradient"
    elif differs_by_run and again:
        needed = f"{projection} ran {again + 1} times in this pass, so that each run has values of its own"
    else:
        return
    raise FreezeNotInForceError(
        f"{projection} of {attention} ran outside of its module's own call, as by {type(module).__name__}.forward("
        f"module, ...) or a forward that was taken from the module before the freeze, and {needed}: call the module "
        "itself"
    )


def cache_buffers(path: str, attention: nn.Module) -> list[tuple[str, Tensor]]:
    """The buffers of an attention that could hold keys and values of earlier passes, by their paths."""
    return [
        (name, buffer)
        for name, buffer in attention.named_buffers(path)
        if buffer.is_floating_point() and buffer.dim() > 2 and not buffer.is_inference()
    ]


def refuse_written_buffers(stack: nn.Module, buffers: Sequence[tuple[str, Tensor]], versions: Sequence[int]) -> None:
    """Raises `InterventionError` where a pass wrote to a buffer of attention that may be a cache of its own.

    Args:
        versions: of the buffers before the pass.
    """
    for (name, buffer), version in zip(buffers, versions, strict=True):
        if buffer._version != version:
            raise InterventionError(
                f"{name} of {type(stack).__name__}, a buffer {list(buffer.shape)}, was written to in this pass: if "
                "attention keeps keys and values there, how many tokens it holds and under which freeze they were "
                "computed is unknown; hand over a cache of transformers (DynamicCache) instead, or take the buffer out"
            )


def refuse_recomputed_tokens(stack: nn.Module, cache: Any, running: Pass) -> None:
    """Raises `InterventionError` where a cache has not grown by the tokens that the pass was given.

    Such a model (XLM, say) is given its cached tokens again and leaves them out by itself, so that the columns of its
    activations are not those of the tokens. A cache of fixed size is not asked: on an accelerator that waits.
    """
    tokens = running.end - running.cached
    if not tokens or getattr(cache, "is_compileable", False):
        return
    grown = filled(cache) - running.cached
    if not grown and not running.cached and holds_tensors(cache):
        raise InterventionError(
            f"{type(stack).__name__} was given a {type(cache).__name__} that holds tensors and says that it holds no "
            "tokens (get_seq_length): which columns a pass computes is unknown; pass a cache that counts its tokens, "
            "such as DynamicCache, or run without one"
        )
    if grown not in (0, tokens):
        raise InterventionError(
            f"{type(stack).__name__} was given {tokens} tokens and added {grown} to its cache of {running.cached}: "
            "which columns this pass computed is unknown; run without a cache (use_cache=False)"
        )


def refuse_kept_tokens(
    stack: nn.Module, watch: StateWatch, before: Mapping[str, tuple[int, ...]], arguments: Mapping[str, Any]
) -> None:
    """Raises `InterventionError` where what attention keeps on itself is longer by the tokens of this pass.

    Args:
        before: the sizes of what it kept before the pass.
        arguments: of the pass.
    """
    given = next((value for value in arguments.values() if isinstance(value, Tensor) and value.dim() > 1), None)
    if given is not None and (path := watch.grown(before, given.shape[1])):
        raise InterventionError(
            f"{path} of {type(stack).__name__} has grown by the {given.shape[1]} tokens of this pass: if attention "
            "keeps keys and values there, how many tokens it holds and under which freeze they were computed is "
            "unknown; hand over a cache of transformers (DynamicCache) instead, or empty it before each pass"
        )
