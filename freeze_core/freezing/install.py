"""Installs freezes in a model, all or none, and takes them out again in any order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import overload

from torch import nn

from freeze_core.attention.layout import Sites
from freeze_core.errors import CircuitFreezeError, FreezeNotInForceError, InterventionError
from freeze_core.forward_patch import patch_on
from freeze_core.freezing.frozen_modules import FrozenAttention, frozen_attention
from freeze_core.freezing.layer_patch import LayerPatch
from freeze_core.freezing.module_path import ModulePath
from freeze_core.freezing.plan import LayerFreeze, plan_layer
from freeze_core.ordinary import ordinary_tensors

__all__ = ["FreezeHandle", "FrozenCircuits", "install", "is_frozen", "refuse_other_stack"]


class FreezeHandle:
    """One installed config; `remove` takes it out, in any order with others.

    Args:
        on_stale_cache: what is done about a cache that was filled otherwise.
        sites: of the model that it is in.
    """

    def __init__(self, on_stale_cache: str, sites: Sites) -> None:
        self.on_stale_cache = on_stale_cache
        self._sites = sites
        self._path = ModulePath(sites.model, sites.stack_name)
        self.held: list[LayerPatch] = []
        """What stands in for modules of the model on its behalf."""

    @ordinary_tensors()
    def remove(self) -> None:
        """Takes this freeze out of the model; twice is harmless.

        Raises:
            CircuitFreezeError: a pass is running, or something else was put on top; the freeze stays as it was.
            FreezeNotInForceError: the freeze had been undone by something else, or what it was in is no part of the
                model any more; it is taken out now.
        """
        self._refuse_change()
        undone = [held.name for held in self.held if held.undone()]
        # Whatever was put around the layers (a compiled module, say) runs them as before.
        replaced = bool(self.held) and self._path.lost() and self._sites.stack not in set(self._sites.model.modules())
        while self.held:
            self.held[-1].without(self)
            self.held.pop()
        if replaced:
            raise FreezeNotInForceError(
                f"{self._path.path} of the model was replaced after the freeze, and passes since then ran without it: "
                "freeze the model anew, run them again"
            )
        if undone:
            raise FreezeNotInForceError(
                f"{', '.join(undone)}: something else had put the forwards back that the freeze replaced (an "
                "offloading undone, say), and passes since then ran without it: freeze the model anew, run them again"
            )

    def _refuse_change(self) -> None:
        for held in self.held:
            held.refuse_change()


class FrozenCircuits(Sequence[FreezeHandle]):
    """The handles of one `freeze_circuits` call, one a config; as a context manager it removes them all."""

    def __init__(self, handles: Sequence[FreezeHandle]) -> None:
        self._handles = tuple(handles)

    @overload
    def __getitem__(self, index: int) -> FreezeHandle: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[FreezeHandle]: ...
    def __getitem__(self, index: int | slice) -> FreezeHandle | Sequence[FreezeHandle]:
        return self._handles[index]

    def __len__(self) -> int:
        return len(self._handles)

    def __iter__(self) -> Iterator[FreezeHandle]:
        return iter(self._handles)

    def remove(self) -> None:
        """Removes every handle, or on an error none; twice is harmless."""
        for handle in self._handles:
            handle._refuse_change()
        with ExitStack() as stack:
            for handle in reversed(self._handles):
                stack.callback(handle.remove)

    def __enter__(self) -> FrozenCircuits:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.remove()
        except FreezeNotInForceError:
            if error is None:  # what was raised inside tells more
                raise
        except CircuitFreezeError as refusal:
            # A `with` may have given it no name, and without one it could not be removed any more.
            refusal.frozen = self
            refusal.add_note("What to call remove() of afterwards is the attribute `frozen` of this error.")
            raise


@ordinary_tensors()
def install(resolved: Sequence[tuple[Sites, Sequence[LayerFreeze]]], on_stale_cache: str = "warn") -> FrozenCircuits:
    """Installs resolved configs, in order, on top of what is live; all of them or, on an error, none."""
    handles = [FreezeHandle(on_stale_cache, sites) for sites, _ in resolved]
    asked: dict[FrozenAttention, list[tuple[FreezeHandle, LayerFreeze]]] = {}
    fresh: dict[int, FrozenAttention] = {}
    for handle, (sites, freezes) in zip(handles, resolved, strict=True):
        for freeze in freezes:
            site = sites.by_layer[freeze.layer]
            frozen = frozen_attention(site.attention) or fresh.get(id(site.attention))
            if frozen is None:
                frozen = fresh[id(site.attention)] = FrozenAttention(site, sites.stack, sites.path(site))
            refuse_other_stack(frozen, sites.stack)
            frozen.composite = frozen.composite or sites.composite
            frozen.encoder_decoder = frozen.encoder_decoder or sites.encoder_decoder
            asked.setdefault(frozen, []).append((handle, freeze))
    prepared = [(frozen, plan_layer(frozen.site, [*frozen.plan.freezes, *added])) for frozen, added in asked.items()]
    for frozen, _ in prepared:
        frozen.refuse_change()
    for frozen, plan in prepared:
        frozen.change(plan)
    for handle in handles:
        handle.held = [frozen for frozen, added in asked.items() if any(owner is handle for owner, _ in added)]
    return FrozenCircuits(handles)


def refuse_other_stack(held: LayerPatch, stack: nn.Module) -> None:
    """Raises `InterventionError` for a layer that is frozen through another model, whose passes alone are followed."""
    if stack not in set(held.stack.modules()) and held.stack not in set(stack.modules()):
        raise InterventionError(
            f"{held.name} is frozen already, through another {type(held.stack).__name__} that holds the same "
            "layer: remove that freeze first, or freeze through that one"
        )


def is_frozen(model: nn.Module) -> bool:
    """Whether any attention in the model, of whatever kind, has a live freeze, or a layer a vector added to it."""
    return any(patch_on(module, LayerPatch) for module in model.modules())
