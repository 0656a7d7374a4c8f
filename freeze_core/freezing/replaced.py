"""How code gets into a running model: an instance's `forward` is replaced by a bound method, and put back.

Unlike a forward hook, a replaced `forward` also takes effect in a model that was compiled before, costs one
Python call, and is seen by every hook that others register on the module.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from types import MethodType
from typing import Any, NoReturn

import torch
from torch import nn

from freeze_core.errors import CircuitFreezeError, InterventionError
from freeze_core.freezing.signatures import signature_of

__all__ = ["ReplacedForward", "ReplacedPass", "standing_in"]

SLOTS = ("forward", "_old_forward")
"""What a module runs, and what accelerate's hooks (offloading, device maps) run once they have taken the first."""


class ReplacedForward:
    """Stands in for `module.forward` between `attach` and `detach`; `original` is what it stands in for."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.original: Callable[..., Any] = module.forward
        self._was_on_instance = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What runs in place of the module's own forward."""
        raise NotImplementedError

    def attach(self) -> None:
        """Puts this object in the place of the module's forward, whatever that is by now."""
        self.original = self.module.forward
        self._was_on_instance = "forward" in vars(self.module)
        self.module.forward = self.bound()

    def bound(self) -> Callable[..., Any]:
        """What is put in the place of the module's forward."""
        return self.forward

    def slot(self) -> str | None:
        """The attribute of the module in which this object is, `None` if it is not in force."""
        return next(
            (name for name in SLOTS if getattr(getattr(self.module, name, None), "__self__", None) is self), None
        )

    def lost(self) -> bool:
        """Whether something else has put the module's own forward back (an offloading undone, say)."""
        return getattr(self.module.forward, "__self__", None) is self.module and self.slot() is None

    def refuse_if_covered(self) -> None:
        """Raises `CircuitFreezeError` if something else was put on top, which `detach` would throw away."""
        if self.slot() is None and not self.lost():
            raise CircuitFreezeError(
                f"the forward of a frozen {type(self.module).__name__} was replaced again, by "
                f"{self.module.forward!r}: take that out before the freeze is changed or removed"
            )

    def detach(self) -> None:
        """Puts back what was there, and leaves no trace on the module; where this object is lost, that is done."""
        if self.lost():
            return
        if self.slot() == "_old_forward":
            setattr(self.module, "_old_forward", self.original)  # noqa: B010 - no tensor, as mypy takes it to be
        elif self._was_on_instance:
            self.module.forward = self.original
        else:
            del self.module.forward

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        # A copied model would run this object, which is bound to the original one.
        raise CircuitFreezeError(
            f"a frozen {type(self.module).__name__} cannot be copied or pickled: remove the freeze first"
        )


class ReplacedPass(ReplacedForward):
    """Stands in for the forward of a module that takes whole passes, one at a time, and looks like it from outside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._busy = threading.Lock()

    def bound(self) -> Callable[..., Any]:
        """Its forward with the signature of the module's own: generation, say, asks for a model's arguments.

        It raises `InterventionError` where a pass is running already.
        """

        def forward(self: ReplacedPass, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return self.run(args, kwargs)
            if not self._busy.acquire(blocking=False):
                raise InterventionError(
                    f"a frozen {type(self.module).__name__} is running already, in another thread or from within "
                    "itself: run a frozen model one pass at a time"
                )
            try:
                return self.run(args, kwargs)
            finally:
                self._busy.release()

        shown = signature_of(self.original)
        owner = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        # inspect reads it; the type checker knows no such attribute of a function.
        forward.__signature__ = shown.replace(parameters=[owner, *shown.parameters.values()])  # type: ignore[attr-defined]
        return MethodType(forward, self)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a pass, the only one for now."""
        raise NotImplementedError


def standing_in(module: nn.Module) -> ReplacedForward | None:
    """What stands in for the forward of `module` now, beneath accelerate's hooks too."""
    owners = [getattr(getattr(module, name, None), "__self__", None) for name in SLOTS]
    return next((owner for owner in owners if isinstance(owner, ReplacedForward)), None)
