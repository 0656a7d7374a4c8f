"""Frozen modules: projections whose output is held, the output projection whose input is, and their attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from freeze_core.attention.layout import AttentionSite
from freeze_core.attention.shards import Shard, gathered, sharded_like
from freeze_core.errors import FreezeNotInForceError, InterventionError
from freeze_core.forward_patch import ForwardPatch, patch_on
from freeze_core.freezing.backward import differentiated, straight_through
from freeze_core.freezing.caches import is_cache
from freeze_core.freezing.guards import refuse_bypass, refuse_lost_projection, refuse_miscount
from freeze_core.freezing.layer_patch import LayerPatch
from freeze_core.freezing.module_path import ModulePath
from freeze_core.freezing.pass_arguments import caches_in
from freeze_core.freezing.pass_tracker import PassTracker, tracker_of
from freeze_core.freezing.plan import LayerPlan, plan_layer
from freeze_core.freezing.recomputation import follow

__all__ = ["FrozenAttention", "FrozenOutput", "FrozenProjection", "frozen_attention"]


def _whole(own: Tensor, shard: Shard | None, width: int, what: str) -> Tensor:
    """`own`, this process's stretch of so many features, as `[..., width]`.

    Raises:
        FreezeNotInForceError: it is no such stretch.
    """
    if shard is None or own.shape[-1] != shard.stop - shard.start:
        raise FreezeNotInForceError(
            f"{what} {own.shape[-1]} features where {width} were expected: its heads are not where the freeze was told "
            "(a projection that was spread over processes after the freeze?)"
        )
    return shard.whole(own)


def _checkpointed_alone(name: str, owner: str) -> InterventionError:
    return InterventionError(
        f"backward_mode 'circuit_ste' runs {owner} twice, with and without the freeze, and {name} is in a gradient "
        "checkpoint of its own, which would not know which of the two it runs again: checkpoint the whole attention, "
        "or its layer"
    )


class FrozenProjection(ForwardPatch):
    """A projection whose output holds frozen activations."""

    def __init__(self, name: str, attention: FrozenAttention, tracker: PassTracker) -> None:
        plan, shared = attention.plan, attention.site.layout.shared
        super().__init__(plan.storage.modules[name])
        self.name = name
        self.storage = plan.storage
        self.edits = plan.edits[name]
        self.source = plan.storage.sources.get(name)
        self.runs = 0
        self.sparing = False
        roles = {role for role, parts in shared.features.items() if any(part.module == name for part in parts)}
        self.reads_encoder = attention.site.kind == "cross" and not roles & {"q"}
        self._owner = attention.site.name
        # Only these need what the attention's own forward does; values are frozen without it.
        needs_attention = attention.plan.needs_clean_backward or attention.plan.differs_by_run
        self._attention = attention if needs_attention else None
        self._width = shared.widths[name]
        # Repeated heads of several roles are not one stretch again; there a projection's output must be gathered.
        self._shard = plan.shards[name] if self.source is None or len(roles) == 1 else None
        self._tracker = tracker

    @property
    def label(self) -> str:
        return f"{super().label} ({self.name} of {self._owner})"

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if follow(self._tracker) and self.sparing:
            raise _checkpointed_alone(self.name, self._owner)
        given: Tensor = self.original(*args, **kwargs)
        x = given if type(given) is Tensor else gathered(given, self.label)
        shape, shard = x.shape, None
        if shape[-1] != self._width:
            shard = self._shard
            x = _whole(x, shard, self._width, f"{self.name} of {self._owner} gave")
        if self.source is not None:
            x = x[..., self.source.to(x.device)]
        if len(shape) > 3:  # latent attention unpacks its cache as [batch, 1, cached + token, feature]
            shape = x.shape
            x = x.flatten(1, -2)
        running = self._tracker.current
        if self._attention is not None and running and self._attention.path not in running.ran:
            attention, plan = self._attention.module, self._attention.plan
            refuse_bypass(self._owner, attention, self.name, running, plan.needs_clean_backward, plan.differs_by_run)
        if running and self.reads_encoder:
            running = running.encoder
        if running and running.is_token_first(shape):
            raise FreezeNotInForceError(
                f"{self.name} of {self._owner} gives {list(shape)} for {running.rows} rows, where [batch, token, "
                "feature] was expected: rows would be taken for tokens"
            )
        frozen = x
        for edit in self.edits:
            if not (self.sparing and edit.needs_clean_backward):
                frozen = edit.apply(x, frozen, running)
        self.runs += 1
        if len(shape) > 3:
            frozen = frozen.view(shape)
        if type(given) is not Tensor:
            return sharded_like(frozen, given)
        return shard.own(frozen) if shard else frozen


class FrozenOutput(ForwardPatch):
    """An output projection whose input z is held, or whose gradient goes to the z of an attention left untouched.

    Hooks on the module see z before it is held; `listeners` are handed what is projected.
    """

    def __init__(self, attention: FrozenAttention, tracker: PassTracker) -> None:
        super().__init__(attention.site.layout.output)
        self.edits = attention.plan.z_edits
        self._shard = attention.plan.z_shard
        self._width = attention.site.layout.z.numel()
        self._owner = attention.site.name
        self.runs = 0
        self.sparing = False
        self.spared: Tensor | None = None
        self.listeners: list[Callable[[Tensor], None]] = []
        self._tracker = tracker

    @property
    def label(self) -> str:
        return f"{super().label} (the output projection of {self._owner})"

    def forward(self, z: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.runs += 1
        if follow(self._tracker) and self.sparing:
            raise _checkpointed_alone("the output projection", self._owner)
        if self.sparing:
            self.spared = z
            return self.original(z, *args, **kwargs)
        given = z
        if type(given) is not Tensor:
            z = gathered(given, self.label)
        if self.spared is not None:
            z, self.spared = straight_through(gathered(self.spared, self.label), z), None
        shard = None
        if z.shape[-1] != self._width:
            shard = self._shard
            z = _whole(z, shard, self._width, f"the output projection of {self._owner} was given")
        frozen = z
        for edit in self.edits:
            frozen = edit.apply(z, frozen, self._tracker.current)
        projected = shard.own(frozen) if shard else frozen
        for listener in self.listeners:
            listener(projected)
        if type(given) is not Tensor:
            projected = sharded_like(projected, given)
        return self.original(projected, *args, **kwargs)


class FrozenAttention(LayerPatch):
    """An attention layer with live freezes: refuses to have run without them."""

    def __init__(self, site: AttentionSite, stack: nn.Module, path: str) -> None:
        super().__init__(site.attention, stack, path)
        self.site = site
        self.plan = plan_layer(site, ())
        self._frozen: list[FrozenProjection | FrozenOutput] = []
        self._attributes: list[tuple[nn.Module, str, Any]] = []
        self._paths: dict[ForwardPatch, ModulePath] = {}

    @property
    def name(self) -> str:
        return self.site.name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        running = self._running_pass(args, kwargs)
        if running and self.plan.differs_by_run:
            running.begin_run(self.site.name)
        for one in self._frozen:
            one.runs = 0
            refuse_lost_projection(self.site.name, one, self._paths[one])
        if self.plan.needs_clean_backward and differentiated():
            self._run_sparing(args, kwargs)
        output = self.original(*args, **kwargs)
        for one in self._frozen:
            if one.runs != 1:
                refuse_miscount(self.site.name, one.module, self._paths[one], one.runs, self._reads_cache(one))
        return output

    @property
    def projections(self) -> list[FrozenProjection]:
        """The projections whose output is held."""
        return [one for one in self._frozen if isinstance(one, FrozenProjection)]

    def _reads_cache(self, one: FrozenProjection | FrozenOutput) -> bool:
        """Whether cross-attention took these keys and values from a cache, which was filled alike (it is marked)."""
        running = self._tracker.current if self._tracker else None
        return isinstance(one, FrozenProjection) and one.reads_encoder and bool(running and running.cross_cached)

    def _run_sparing(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Runs the attention once without the edits that spare the circuit, and keeps its z for the gradient."""
        running = self._tracker.current if self._tracker else None
        if running and (running.cached or running.cross_cached):
            raise InterventionError(
                f"backward_mode 'circuit_ste' has no gradient through the {running.cached} tokens that are cached: run "
                "without a cache (use_cache=False), or under torch.no_grad()"
            )
        # A cache that is handed over is to be filled once, whatever it is called.
        without_cache = {name: None if is_cache(value) else value for name, value in kwargs.items()}
        others = tuple(None if is_cache(value) else value for value in args)
        if any(True for _ in caches_in((others, without_cache))):
            raise InterventionError(
                "backward_mode 'circuit_ste' runs attention twice, and would fill the cache twice that attention is "
                "given in a container: run without a cache (use_cache=False), or under torch.no_grad()"
            )
        with _generators_kept(self.module), self._sparing():
            self.original(*others, **without_cache)

    @contextmanager
    def _sparing(self) -> Iterator[None]:
        for one in self._frozen:
            one.sparing = True
        try:
            yield
        finally:
            for one in self._frozen:
                one.sparing = False
                one.runs = 0

    def without(self, owner: object) -> None:
        rest = [(handle, freeze) for handle, freeze in self.plan.freezes if handle is not owner]
        self.change(plan_layer(self.site, rest))

    def change(self, plan: LayerPlan) -> None:
        """Takes out what is there and puts in `plan`; one without freezes leaves no trace."""
        if self.plan.freezes:
            self._take_out()
        self.plan = plan
        if plan.freezes:
            self._put_in(plan)

    def _put_in(self, plan: LayerPlan) -> None:
        self.attach()
        self._tracker = tracker_of(self.stack, self.composite, self.encoder_decoder)
        self._tracker.put(self.path, plan.in_force)
        for module in (self.site.layout.core, *plan.storage.readers):
            for name, value in plan.storage.attributes.items():
                self._attributes.append((module, name, getattr(module, name)))
                setattr(module, name, value)
        for name in plan.storage.modules:
            if plan.edits[name] or name in plan.storage.sources:
                self._frozen.append(FrozenProjection(name, self, self._tracker))
        if plan.z_edits or plan.needs_clean_backward:
            self._frozen.append(FrozenOutput(self, self._tracker))
        paths = {module: path for path, module in self.site.attention.named_modules()}
        for one in self._frozen:
            self._paths[one] = ModulePath(self.site.attention, paths[one.module])
            one.attach()

    def refuse_change(self) -> None:
        """Raises `CircuitFreezeError` if a pass is running, or something else was put on top of what is installed or
        would be.

        Nothing is changed by then.
        """
        layout = self.site.layout
        self._refuse_change(*layout.shared.modules.values(), layout.output)

    def _take_out(self) -> None:
        self.refuse_change()
        for one in self._frozen:
            one.detach()
        self._frozen, self._paths = [], {}
        while self._attributes:
            setattr(*self._attributes.pop())
        if self._tracker:
            self._tracker.put(self.path, None)
            self._tracker = None
        self.detach()


@contextmanager
def _generators_kept(module: nn.Module) -> Iterator[None]:
    """Puts torch's generators back, so that the pass that counts draws the dropout that it would have drawn alone."""
    if not module.training:
        yield
        return
    devices = {parameter.device for parameter in module.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=devices):
        yield


def frozen_attention(attention: nn.Module) -> FrozenAttention | None:
    """What freezes this attention module now, if anything does."""
    return patch_on(attention, FrozenAttention)
