"""A decoder layer whose residual stream has vectors added to it, with the promises of a freeze."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from freeze_core.errors import InterventionError
from freeze_core.forward_patch import patch_on
from freeze_core.freezing.install import FreezeHandle, FrozenCircuits, refuse_other_stack
from freeze_core.freezing.layer_patch import LayerPatch
from freeze_core.freezing.pass_tracker import InForce, tracker_of
from freeze_core.freezing.passes import Pass
from freeze_core.vectors.positions import Positions
from freeze_core.vectors.sites import ResidualSite, stream_of, with_stream

__all__ = ["Addition", "steer"]


@dataclass(frozen=True, eq=False)
class Addition:
    """What is added to the stream of a layer.

    Args:
        delta: the vector times its strength `[hidden]`, nobody else's; `None`, at strength 0, is nothing at all.
        positions: where.
        key: what decides the outcome, as text.
    """

    delta: Tensor | None
    positions: Positions
    key: str

    def apply(self, x: Tensor, running: Pass | None) -> Tensor:
        """`x` `[batch, token, hidden]` with the vector added, in its dtype; other positions bit for bit."""
        if self.delta is None:
            return x
        x, chosen = self.positions.chosen(x, running)
        added = x + self.delta.to(x.device, x.dtype)
        return added if chosen is None else torch.where(chosen[..., None], added, x)


class SteeredLayer(LayerPatch):
    """Stands in for the forward of a decoder layer: adds vectors to the stream that it gives, in order."""

    def __init__(self, site: ResidualSite) -> None:
        super().__init__(site.module, site.sites.stack, site.path)
        self.site = site
        self.additions: list[tuple[FreezeHandle, Addition]] = []

    @property
    def name(self) -> str:
        return self.site.name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        running = self._running_pass(args, kwargs)
        if running:
            running.begin_run(self.path)
            if running.turn:
                raise InterventionError(
                    f"{self.name} runs several times in one pass, and a vector is of one run: it cannot be added here"
                )
        output = self.original(*args, **kwargs)
        before = x = stream_of(output, self.name)
        for _, addition in self.additions:
            if addition.delta is not None and addition.delta.shape[-1] != x.shape[-1]:
                raise InterventionError(
                    f"{self.name} gives {x.shape[-1]} features where the vector has {addition.delta.shape[-1]}: its "
                    "stream is spread over processes, or not the one that the vector is of"
                )
            if running and running.is_token_first(x.shape):
                raise InterventionError(
                    f"{self.name} gives {list(x.shape)} for {running.rows} rows, where [batch, token, hidden] was "
                    "expected: rows would be taken for tokens"
                )
            x = addition.apply(x, running)
        return output if x is before else with_stream(output, x)

    def change(self, additions: Sequence[tuple[FreezeHandle, Addition]]) -> None:
        """Adds `additions` from now on; none leaves no trace."""
        if additions and not self.additions:
            self.attach()
            self._tracker = tracker_of(self.stack, self.composite)
        elif self.additions and not additions:
            self.detach()
        self.additions = list(additions)
        if self._tracker:
            self._tracker.put(self.path, self._in_force() if additions else None)
            self._tracker = self._tracker if additions else None

    def _in_force(self) -> InForce:
        keys = [addition.key for _, addition in self.additions if addition.delta is not None]
        stale = [owner.on_stale_cache for owner, _ in self.additions]
        return InForce(
            module=self.module,
            key=f"stream {self.site.layer} {' '.join(keys)}" if keys else "",
            treatments=tuple(keys),
            on_stale=max(stale, key=("ignore", "warn", "error").index),
        )

    def without(self, owner: object) -> None:
        self.refuse_change()
        self.change([(one, addition) for one, addition in self.additions if one is not owner])

    def refuse_change(self) -> None:
        self._refuse_change()


def steer(site: ResidualSite, addition: Addition, on_stale_cache: str) -> FrozenCircuits:
    """Adds to the stream after what is added to it already, until it is removed, in any order.

    Raises:
        CircuitFreezeError: a pass is running, or something else was put on top; nothing is installed.
    """
    layer = patch_on(site.module, SteeredLayer) or SteeredLayer(site)
    refuse_other_stack(layer, site.sites.stack)
    layer.composite = layer.composite or site.sites.composite
    layer.refuse_change()
    handle = FreezeHandle(on_stale_cache, site.sites)
    layer.change([*layer.additions, (handle, addition)])
    handle.held = [layer]
    return FrozenCircuits([handle])
