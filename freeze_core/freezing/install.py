"""Installs freezes in a model: the frozen projections and attention modules, and how to take them out again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, overload

import torch
from torch import Tensor, nn

from freeze_core.attention.sites import AttentionSite, Sites
from freeze_core.attention.storages import Storage
from freeze_core.config import FreezeType, Role
from freeze_core.errors import FreezeNotInForceError, InterventionError
from freeze_core.freezing.backward import blend
from freeze_core.freezing.plan import Assignment, LayerFreeze, Treatment, assign, storage_for
from freeze_core.freezing.replaced import ReplacedForward
from freeze_core.freezing.running import Pass, PassTracker
from freeze_core.freezing.values import NoiseTable, accumulation_dtype, statistics

__all__ = ["FreezeHandle", "FrozenCircuits", "frozen_attention", "install", "live_freezes"]


class Edit:
    """One treatment of the features in `mask` (`[feature]` bool) of one projection's output."""

    def __init__(self, treatment: Treatment, mask: Tensor, noise: Sequence[tuple[NoiseTable, Tensor]]) -> None:
        self.treatment = treatment
        self.mask = mask
        self._noise = noise

    def apply(self, x: Tensor, frozen: Tensor, running: Pass | None) -> Tensor:
        """`frozen` with this edit made; `x` is the activation before any, both `[batch, token, feature]`."""
        mask = self.mask.to(x.device)
        r = self._replacement(x, running)
        return blend(x, frozen, mask, r, self.treatment.strength, self.treatment.backward_mode)

    def _replacement(self, x: Tensor, running: Pass | None) -> Tensor:
        if self.treatment.freeze_type == FreezeType.ZERO:
            return x.new_zeros(())
        if running is None:
            raise InterventionError(
                f"freeze_type '{self.treatment.freeze_type}' needs to know the running pass, but the layer was run by "
                "itself: run the model, or the module that holds its layers"
            )
        if not self.treatment.needs_statistics:
            return float(self.treatment.noise_std or 0) * self._normals(x, running)
        mean, deviation = self._statistics(x, running)
        if self.treatment.freeze_type == FreezeType.MEAN:
            return mean
        return mean + deviation * self._normals(x, running)

    def _statistics(self, x: Tensor, running: Pass) -> tuple[Tensor, Tensor]:
        if running.cached:
            raise InterventionError(
                f"freeze_type '{self.treatment.freeze_type}' takes its statistics from the pass, and this pass goes on "
                f"after {running.cached} cached tokens that it does not see: run without a cache "
                "(use_cache=False), or freeze with zero or with noise_std"
            )
        real = running.real()
        if real is not None and real.shape != x.shape[:2]:
            raise InterventionError(
                f"attention_mask is {list(real.shape)} and the activations are {list(x.shape[:2])} [batch, token]: "
                "statistics of the pass need a mask of the same shape"
            )
        return statistics(x, real)

    def _normals(self, x: Tensor, running: Pass) -> Tensor:
        """Draws `[token, feature]`; query heads of one KV head share theirs."""
        tokens = x.shape[1]
        draws = torch.zeros(x.shape[1:], dtype=accumulation_dtype(x.dtype), device=x.device)
        for table, index in self._noise:
            drawn = table.columns(running.column(tokens), tokens, x)
            drawn = drawn.repeat_interleave(index.shape[0] // drawn.shape[1], dim=1)
            draws[:, index.flatten()] = drawn.flatten(1)
        return draws


class FrozenProjection(ReplacedForward):
    """A projection whose output holds frozen activations."""

    def __init__(
        self,
        module: nn.Module,
        owner: str,
        tracker: PassTracker | None,
        width: int,
        source: Tensor | None,
        edits: Sequence[Edit],
    ) -> None:
        super().__init__(module)
        self.edits = edits
        self.source = source
        self.ran = False
        self._owner = owner
        self._tracker = tracker
        self._width = width

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x: Tensor = self.original(*args, **kwargs)
        if self.source is not None:
            x = x[..., self.source.to(x.device)]
        if x.shape[-1] != self._width:
            raise FreezeNotInForceError(
                f"a projection of {self._owner} gave {x.shape[-1]} features where {self._width} were expected: "
                "its heads are not where the freeze was told (a sharded projection?)"
            )
        shape = x.shape
        x = x.flatten(1, -2)  # latent attention unpacks its cache as [batch, 1, cached + token, feature]
        running = self._tracker.current if self._tracker else None
        frozen = x
        for edit in self.edits:
            frozen = edit.apply(x, frozen, running)
        self.ran = True
        return frozen.view(shape)


@dataclass(frozen=True, eq=False)
class Wiring:
    """All that carries out the freezes of one layer, worked out before anything is touched."""

    freezes: Sequence[tuple[FreezeHandle, LayerFreeze]]
    storage: Storage
    edits: Mapping[str, list[Edit]]

    @property
    def needs_pass(self) -> bool:
        return any(edit.treatment.needs_pass for edits in self.edits.values() for edit in edits)


def wire(site: AttentionSite, freezes: Sequence[tuple[FreezeHandle, LayerFreeze]]) -> Wiring:
    """Works out what carries out `freezes`, in order, in the layer at `site`."""
    assignment = assign(site, [freeze for _, freeze in freezes])
    storage = storage_for(site, assignment)
    edits = {name: _edits(site, storage, name, assignment) for name in storage.modules}
    return Wiring(freezes, storage, edits)


def _edits(site: AttentionSite, storage: Storage, name: str, assignment: Assignment) -> list[Edit]:
    """The edits of one module's output, one for each treatment that occurs in it."""
    masks: dict[Treatment, Tensor] = {}
    drawn: list[tuple[Role, int, Tensor]] = []
    for role, parts in storage.features.items():
        for number, part in enumerate(parts):
            if part.module != name:
                continue
            drawn.append((role, number, part.features))
            sharing = site.heads // len(part.features)  # the assignment counts query heads, the storage may share
            for head, treatment in enumerate(assignment[role][::sharing]):
                if treatment is not None:
                    mask = masks.setdefault(treatment, torch.zeros(storage.widths[name], dtype=torch.bool))
                    mask[part.features[head]] = True
    return [Edit(treatment, mask, _noise(site, treatment, drawn)) for treatment, mask in masks.items()]


def _noise(
    site: AttentionSite, treatment: Treatment, drawn: Sequence[tuple[Role, int, Tensor]]
) -> list[tuple[NoiseTable, Tensor]]:
    """For each part of an output a table of draws, a head of the storage that the model came with for each of its."""
    if treatment.freeze_type != FreezeType.NOISE:
        return []
    tables = []
    for role, number, index in drawn:
        heads, features = site.layout.shared.features[role][number].features.shape
        tables.append((NoiseTable((treatment.seed, site.layer, "qkv".index(role), number), heads, features), index))
    return tables


class FrozenAttention(ReplacedForward):
    """An attention layer with live freezes: refuses to have run without them."""

    def __init__(self, site: AttentionSite, stack: nn.Module) -> None:
        super().__init__(site.attention)
        self.site = site
        self.wiring = Wiring((), site.layout.shared, {})
        self.projections: list[FrozenProjection] = []
        self._stack = stack
        self._tracker: PassTracker | None = None
        self._attributes: dict[str, Any] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for projection in self.projections:
            projection.ran = False
        output = self.original(*args, **kwargs)
        for projection in self.projections:
            if not projection.ran:
                raise FreezeNotInForceError(
                    f"{self.site.name} ran without its {type(projection.module).__name__} that holds frozen "
                    "activations: this attention does not call its projections, so the freeze had no effect"
                )
        return output

    def rewire(self, wiring: Wiring) -> None:
        """Takes out what is there and puts in `wiring`; one without freezes leaves no trace."""
        if self.wiring.freezes:
            self._take_out()
        self.wiring = wiring
        if wiring.freezes:
            self._put_in(wiring)

    def _put_in(self, wiring: Wiring) -> None:
        self.attach()
        if wiring.needs_pass:
            self._tracker = _tracker_of(self._stack)
            self._tracker.users += 1
        for name, value in wiring.storage.attributes.items():
            self._attributes[name] = getattr(self.module, name)
            setattr(self.module, name, value)
        for name, module in wiring.storage.modules.items():
            source = wiring.storage.sources.get(name)
            if source is not None or wiring.edits[name]:
                width, edits = wiring.storage.widths[name], wiring.edits[name]
                projection = FrozenProjection(module, self.site.name, self._tracker, width, source, edits)
                projection.attach()
                self.projections.append(projection)

    def _take_out(self) -> None:
        for replaced in (self, *self.projections):
            replaced.refuse_if_covered()
        for projection in self.projections:
            projection.detach()
        self.projections = []
        for name, value in self._attributes.items():
            setattr(self.module, name, value)
        self._attributes = {}
        if self._tracker:
            self._tracker.users -= 1
            if not self._tracker.users:
                self._tracker.detach()
            self._tracker = None
        self.detach()


def _tracker_of(stack: nn.Module) -> PassTracker:
    tracker = getattr(stack.forward, "__self__", None)
    if not isinstance(tracker, PassTracker):
        tracker = PassTracker(stack)
        tracker.attach()
    return tracker


def frozen_attention(attention: nn.Module) -> FrozenAttention | None:
    """What freezes this attention module now, if anything does."""
    owner = getattr(attention.forward, "__self__", None)
    return owner if isinstance(owner, FrozenAttention) else None


def live_freezes(sites: Sites) -> list[LayerFreeze]:
    """The freezes that are live in these layers, in install order within each layer."""
    live = [frozen_attention(site.attention) for site in sites.by_layer.values()]
    return [freeze for frozen in live if frozen for _, freeze in frozen.wiring.freezes]


class FreezeHandle:
    """One installed config; `remove` takes it out, in any order with others."""

    def __init__(self) -> None:
        self._attentions: list[FrozenAttention] = []

    def remove(self) -> None:
        """Takes this freeze out of the model; twice is harmless."""
        while self._attentions:
            frozen = self._attentions[-1]
            rest = [(handle, freeze) for handle, freeze in frozen.wiring.freezes if handle is not self]
            frozen.rewire(wire(frozen.site, rest))
            self._attentions.pop()


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
        """Removes every handle; twice is harmless."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> FrozenCircuits:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def install(sites: Sites, resolved: Sequence[Sequence[LayerFreeze]]) -> FrozenCircuits:
    """Installs resolved configs, in order, on top of what is live; all of them or, on an error, none."""
    handles = [FreezeHandle() for _ in resolved]
    asked: dict[int, list[tuple[FreezeHandle, LayerFreeze]]] = {}
    for handle, freezes in zip(handles, resolved, strict=True):
        for freeze in freezes:
            asked.setdefault(freeze.layer, []).append((handle, freeze))
    prepared = []
    for layer, added in asked.items():
        site = sites.by_layer[layer]
        frozen = frozen_attention(site.attention) or FrozenAttention(site, sites.stack)
        prepared.append((frozen, wire(site, [*frozen.wiring.freezes, *added])))
    for frozen, wiring in prepared:
        frozen.rewire(wiring)
    for handle in handles:
        handle._attentions = [frozen for frozen, wiring in prepared if any(of is handle for of, _ in wiring.freezes)]
    return FrozenCircuits(handles)
