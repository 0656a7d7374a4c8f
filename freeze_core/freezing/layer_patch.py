"""A module of one layer in which something is held or added, told of the pass that runs through its stack."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from freeze_core.errors import CircuitFreezeError
from freeze_core.forward_patch import ForwardPatch, patch_on, patches_on
from freeze_core.freezing.guards import refuse_foreign_recomputation, refuse_run_outside_of_a_pass
from freeze_core.freezing.pass_tracker import PassTracker
from freeze_core.freezing.passes import Pass
from freeze_core.freezing.recomputation import follow

__all__ = ["LayerPatch"]


class LayerPatch(ForwardPatch):
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

    def _running_pass(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pass | None:
        """The running pass, in which this module is noted to have run; `None` where it is run by itself.

        Raises:
            FreezeNotInForceError: it is run outside of a pass, with a cache or for the gradient of an unfrozen pass.
        """
        if self._tracker is None:
            return None
        running = self._tracker.current
        follow(self._tracker)
        if running is not None:
            running.ran.add(self.path)
        elif not torch.compiler.is_compiling():
            refuse_foreign_recomputation(self.name, self._tracker.recomputing)
            refuse_run_outside_of_a_pass(self.name, self.stack, (*args, *kwargs.values()))
        return running

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
        tracker = patch_on(self.stack, PassTracker)
        if tracker and tracker.current is not None:
            raise CircuitFreezeError(
                f"{self.name} is frozen, and a pass is running: freezes are installed and removed between passes"
            )
