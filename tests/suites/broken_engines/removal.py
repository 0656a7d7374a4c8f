"""Engines that leave a trace, or are not what they were after an error, another batch or another freeze."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from honest_engine import HookEngine, Layer
from torch import Tensor, nn

from freeze_core import InterventionConfig

Config = InterventionConfig


class LeavesAHook(HookEngine):
    """Leaves its last hook on."""

    def install(self, model: nn.Module) -> None:
        del self.undo[1:2]
        super().install(model)


class LeavesAnAttribute(HookEngine):
    """Leaves a note on the attention module."""

    def install_layer(self, layer: Layer, configs: list[Config]) -> None:
        layer.module.frozen = True
        super().install_layer(layer, configs)


class LeavesAParameterMoved(HookEngine):
    """Adds to a parameter and takes away again."""

    def install_layer(self, layer: Layer, configs: list[Config]) -> None:
        super().install_layer(layer, configs)
        parameter = next(layer.module.parameters())
        parameter.data += 1.0
        self.undo.append(lambda: parameter.data.sub_(1.0))


class StaysBeneathAWrapper(HookEngine):
    """Takes a wrapper that somebody has put around a forward for the module's own, and ends nothing there."""

    def install_layer(self, layer: Layer, configs: list[Config]) -> None:
        start = len(self.undo)
        super().install_layer(layer, configs)
        self.undo[start:] = [self.unless_bound(layer.module, undo) for undo in self.undo[start:]]

    def unless_bound(self, module: nn.Module, undo: Callable[[], object]) -> Callable[[], object]:
        def end() -> None:
            if getattr(vars(module).get("forward"), "__self__", None) is not module:
                undo()

        return end


class ForgetsOnError(HookEngine):
    """Removes nothing when the block raises."""

    @contextmanager
    def freeze(self, model: nn.Module, config: Any) -> Iterator[Callable[..., Any]]:
        self.on = [(self, [config])]
        self.install(model)
        yield model
        self.on = []
        self.install(model)


class SwallowsErrors(HookEngine):
    """Ends the block quietly when it raises."""

    @contextmanager
    def freeze(self, model: nn.Module, config: Any) -> Iterator[Callable[..., Any]]:
        try:
            with super().freeze(model, config) as frozen:
                yield frozen
        except Exception:  # the flaw
            pass


class StaysAfterAnInterrupt(HookEngine):
    """Ends after errors, but not when the user interrupts the block."""

    @contextmanager
    def freeze(self, model: nn.Module, config: Config | Sequence[Config]) -> Iterator[Callable[..., Any]]:
        self.on.append((object(), self.asked(model, config)))
        own = self.on[-1]
        self.install(model)
        try:
            yield model
        except Exception:
            self.end(model, own)
            raise
        self.end(model, own)

    def end(self, model: nn.Module, own: object) -> None:
        self.on = [entry for entry in self.on if entry is not own]
        self.install(model)


class OffAfterAnError(HookEngine):
    """Does nothing in the pass after one that did not come to its end."""

    def __init__(self) -> None:
        super().__init__()
        self.running = False
        self.off = False

    def remember_pass(self, model: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        super().remember_pass(model, args, kwargs)
        self.off, self.running = self.running, True

    def install(self, model: nn.Module) -> None:
        super().install(model)
        self.running = False
        if self.undo:
            self.undo.append(model.register_forward_hook(self.end).remove)

    def end(self, *_: object) -> None:
        self.running = False

    def frozen(self, layer: Layer, role: str, x: Tensor, configs: list[Config], readers: int) -> Tensor:
        return x if self.off else super().frozen(layer, role, x, configs, readers)


class RemembersTheFirstBatch(HookEngine):
    """Keeps the replacement of the first pass."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[tuple[int, str], Tensor] = {}

    def replacement(self, layer: Layer, role: str, x: Tensor, config: Config) -> Tensor:
        first = super().replacement(layer, role, x, config).mean((0, 1) if config.freeze_type == "zero" else ())
        return self.kept.setdefault((layer.number, role), first)

    def install(self, model: nn.Module) -> None:
        self.kept.clear()
        super().install(model)


class LastOneOnly(HookEngine):
    """Keeps the innermost of nested freezes alone."""

    def install(self, model: nn.Module) -> None:
        kept, self.on = self.on, self.on[-1:]
        super().install(model)
        self.on = kept


class EndsTheInnermost(HookEngine):
    """Ends the freeze that began last, whichever was asked for."""

    @contextmanager
    def freeze(self, model: nn.Module, config: Config | Sequence[Config]) -> Iterator[Callable[..., Any]]:
        self.on.append((object(), [config] if isinstance(config, Config) else list(config)))
        self.install(model)
        try:
            yield model
        finally:
            self.on.pop()
            self.install(model)


class InnerEndEndsAll(HookEngine):
    """Ends all freezes when the innermost one ends first."""

    @contextmanager
    def freeze(self, model: nn.Module, config: Config | Sequence[Config]) -> Iterator[Callable[..., Any]]:
        with super().freeze(model, config) as frozen:
            own = self.on[-1]
            try:
                yield frozen
            finally:
                if self.on and self.on[-1] is own:
                    self.on = [own]


class LostAfterTheSecondPass(HookEngine):
    """Freezes two passes, and then no more."""

    passes = 0

    def install(self, model: nn.Module) -> None:
        super().install(model)
        self.passes = 0

    def remember_pass(self, model: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        super().remember_pass(model, args, kwargs)
        self.passes += 1

    def frozen(self, layer: Layer, role: str, x: Tensor, configs: list[Config], readers: int) -> Tensor:
        return super().frozen(layer, role, x, configs, readers) if self.passes <= 2 else x


class KeepsTheLastMask(HookEngine):
    """Takes a pass without a mask to be padded like the last one of its shape that had one."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: dict[torch.Size, Tensor] = {}

    def samples(self, x: Tensor) -> Tensor:
        if self.mask is not None:
            self.masks[x.shape[:2]] = self.mask.clone()
        mask = self.masks.get(x.shape[:2])
        return x.flatten(0, 1) if mask is None else x[mask.bool()]

    def install(self, model: nn.Module) -> None:
        super().install(model)
        if not self.undo:
            self.masks.clear()
