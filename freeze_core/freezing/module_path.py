"""Where a module hangs beneath another one, so that it can be told at each pass whether it still does."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["ModulePath"]


class ModulePath:
    """The path from `root` to a module, looked up once: each pass only compares.

    Args:
        path: as `root.get_submodule` takes it.
    """

    def __init__(self, root: nn.Module, path: str) -> None:
        self.path = path
        self._links: list[tuple[nn.Module, str, nn.Module]] = []
        self._forwards: list[tuple[dict[str, Any], Any]] = []
        module = root
        for name in path.split(".") if path else ():
            holder, module = module, module.get_submodule(name)
            self._links.append((holder, name, module))
            self._forwards.append((vars(module), vars(module).get("forward")))

    def lost(self) -> bool:
        """Whether another module, or none, is there now, or around there."""
        for holder, name, module in self._links:  # noqa: SIM110 - a generator costs more than all it looks at
            if holder._modules.get(name) is not module:
                return True
        return False

    def covered(self) -> bool:
        """Whether the module, or one around it, has been given another forward since."""
        for attributes, forward in self._forwards:  # noqa: SIM110 - as above
            if attributes.get("forward") is not forward:
                return True
        return False
