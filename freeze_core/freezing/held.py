"""A module of one layer in which something is held or added, told of the pass that runs through its stack."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from freeze_core.errors import CircuitFreezeError, FreezeNotInForceError
from freeze_core.freezing.pass_arguments import caches_in
from freeze_core.freezing.passes import Pass
from freeze_core.freezing.replaced import ReplacedForward, patches_on, standing_in
from freeze_core.freezing.tracking import UNFROZEN_BEFORE, PassTracker

__all__ = ["Held"]


class Held(ReplacedForward):
    """Stands in for the forward of a module of a layer, of whose passes a tracker tells while it is in force.

    Args:
        module: an attention, or a whole layer.
        stack: the module whose passes are followed.
        path: of the module within the stack.
    """

    def __init__(self, module: nn.Module, stack: nn.Module, path: str) -> None:
        super().__init__(module)
        self.stack = stack
        self.path = path
        self.composite: nn.Module | None = None
        self.encoder_decoder: tuple[nn.Module, nn.Module] | None = None
        self._tracker: PassTracker | None = None

    @property
    def name(self) -> str:
        """The path of the module in the model."""
        raise NotImplementedError

    @property
    def label(self) -> str:
        return f"{super().label} ({self.name})"

    def refuse_change(self) -> None:
        """Raises `CircuitFreezeError` where nothing can be put in or taken out now; nothing is changed by then."""
        raise NotImplementedError

    def without(self, owner: object) -> None:
        """Takes out what `owner` has put in."""
        raise NotImplementedError

    def undone(self) -> bool:
        """Whether nothing is left of what would notice that it is not in force: passes ran as if it were not there."""
        return self.lost() and self._tracker is not None and self._tracker.lost()

    def _told(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pass | None:
        """The running pass, which is told that this module ran; `None` where it is run by itself.

        Raises:
            FreezeNotInForceError: it is run outside of a pass, where it matters what is not told there.
        """
        running = self._tracker.current if self._tracker else None
        if self._tracker:
            self._tracker.follow()
        if running is None:
            self._refuse_untold_pass(args, kwargs)
        else:
            running.ran.add(self.path)
        return running

    def _refuse_untold_pass(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuses to run outside of a pass through the stack, where it matters what is not told there.

        What gradient checkpointing runs again is followed from its first run; one that was unfrozen was not. And a
        cache is told to be stale by the pass.
        """
        if torch.compiler.is_compiling() or self._tracker is None:
            return
        if torch._C._current_graph_task_id() != -1 and not self._tracker.recomputing:
            raise FreezeNotInForceError(UNFROZEN_BEFORE.format(what=self.name))
        if any(True for _ in caches_in((args, kwargs))):
            raise FreezeNotInForceError(
                f"{self.name} is run with a cache, outside of the {type(self.stack).__name__} through which it "
                "was frozen, so that it cannot be told whether what is cached is frozen alike: freeze it through the "
                "model that runs it, or run it without a cache (use_cache=False)"
            )

    def _refuse_change(self, *modules: nn.Module) -> None:
        """Raises `CircuitFreezeError` if a pass is running through the stack, or if something was put on top of what is
        on the stack, around it, on this module or on one of `modules`.
        """
        self._refuse_running()
        around = [self.composite] if self.composite is not None else []
        around += [self.encoder_decoder[0]] if self.encoder_decoder else []
        for module in (self.module, *modules, self.stack, *around):
            for patch in patches_on(module):
                patch.refuse_if_covered()

    def _refuse_running(self) -> None:
        """Raises `CircuitFreezeError` if a pass is running through the stack."""
        tracker = standing_in(self.stack, PassTracker)
        if tracker and tracker.current is not None:
            raise CircuitFreezeError(
                f"{self.name} is frozen, and a pass is running: freezes are installed and removed between passes"
            )
