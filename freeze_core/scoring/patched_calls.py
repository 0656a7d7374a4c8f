"""Modules whose calls go to an action, which can be exchanged from pass to pass.

A sweep runs most modules of a model in few of its passes. In the others a layer returns what it returned before, or the
unembedding hands over its input for later. Each such behaviour is an action: a small object that is called with the
module's own forward and the arguments of the call, and returns what the caller gets. What a module does in a pass is
therefore one attribute of its patch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from freeze_core.forward_patch import ForwardPatch

__all__ = ["Action", "PatchedModule", "assign_actions", "attach", "run_module"]

Action = Callable[..., Any]
"""Called as `action(forward, *args, **kwargs)`."""


def run_module(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The action that runs the module as it is."""
    return forward(*args, **kwargs)


class PatchedModule(ForwardPatch):
    """Hands each call of a module to `action`. A freeze that is installed later lies on top of it."""

    def __init__(self, module: nn.Module, action: Action = run_module) -> None:
        super().__init__(module)
        self.action = action

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.action(self.original, *args, **kwargs)


@contextmanager
def attach(patches: Iterable[PatchedModule]) -> Iterator[None]:
    """Patches modules within the context."""
    with ExitStack() as stack:
        for patch in patches:
            patch.attach()
            stack.callback(patch.detach)
        yield


@contextmanager
def assign_actions(actions: Iterable[tuple[PatchedModule, Action]]) -> Iterator[None]:
    """Has patches take these actions within the context, and the ones before afterwards."""
    before = []
    try:
        for patch, action in actions:
            before.append((patch, patch.action))
            patch.action = action
        yield
    finally:
        for patch, action in before:
            patch.action = action
