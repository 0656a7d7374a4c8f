"""How code gets into a running model: an instance's `forward` is replaced by a bound method, and put back.

Unlike a forward hook, a replaced `forward` also takes effect in a model that was compiled before, costs one
Python call, and is seen by every hook that others register on the module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from torch import nn

from freeze_core.errors import CircuitFreezeError

__all__ = ["ReplacedForward"]


class ReplacedForward:
    """Stands in for `module.forward` between `attach` and `detach`; `original` is what it stands in for."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.original: Callable[..., Any] = module.forward
        self._was_on_instance = "forward" in vars(module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What runs in place of the module's own forward."""
        raise NotImplementedError

    def attach(self) -> None:
        """Puts this object in the place of the module's forward."""
        self.module.forward = self.forward

    def refuse_if_covered(self) -> None:
        """Raises `CircuitFreezeError` if something else was put on top, which `detach` would throw away."""
        if getattr(self.module.forward, "__self__", None) is not self:
            raise CircuitFreezeError(
                f"the forward of a frozen {type(self.module).__name__} was replaced again, by "
                f"{self.module.forward!r}: take that out before the freeze is changed or removed"
            )

    def detach(self) -> None:
        """Puts back what was there, and leaves no trace on the module."""
        if self._was_on_instance:
            self.module.forward = self.original
        else:
            del self.module.forward

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        # A copied model would run this object, which is bound to the original one.
        raise CircuitFreezeError(
            f"a frozen {type(self.module).__name__} cannot be copied or pickled: remove the freeze first"
        )
