"""Follows the passes of a stack of layers: which one is running, and what its cache is filled under."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from freeze_core.errors import FreezeNotInForceError, InterventionError
from freeze_core.freezing.caches import check_cache, check_emptied_cache, filled, mark_cache
from freeze_core.freezing.padding import Arguments, Composite, prompt_of, told
from freeze_core.freezing.passes import Pass
from freeze_core.freezing.places import Place
from freeze_core.freezing.replaced import ReplacedPass, standing_in
from freeze_core.freezing.rows import RowOrder, refuse_reordering

__all__ = ["InForce", "PassTracker", "tracker_of"]


class InForce(NamedTuple):
    """What a frozen attention tells of itself.

    Args:
        key: what is frozen at which value, as text; nothing where nothing is.
        wiring: the same and what gradients do.
        unshared: whether each query head has KV heads of its own.
        needs_rows: whether rows must stay where they are between passes.
        on_stale: what to do about a foreign cache.
    """

    key: str
    wiring: tuple[object, ...]
    unshared: bool
    needs_rows: bool
    on_stale: str


ARGUMENTS = (
    "attention_mask",
    "past_key_values",
    "cache",
    "input_ids",
    "inputs_embeds",
    "encoder_hidden_states",
    "encoder_attention_mask",
)


class PassTracker(ReplacedPass):
    """Stands in for the forward of a stack of layers: knows the pass that runs through it, and marks its cache."""

    def __init__(self, stack: nn.Module) -> None:
        super().__init__(stack)
        self._arguments = Arguments(self.original, *ARGUMENTS)
        self.current: Pass | None = None
        self.composite: Composite | None = None
        self._prompt = prompt_of(stack)
        self._in_force: dict[str, InForce] = {}
        self._places: dict[str, Place] = {}
        self._mark = ""
        self._unshared = self._needs_rows = False
        self._on_stale = "ignore"
        self._row_order = RowOrder()

    def put(self, name: str, in_force: InForce | None) -> None:
        """Notes what is in force in the attention at the path `name`; `None` is nothing. Attached while anything is."""
        if in_force is None:
            self._in_force.pop(name, None)
            self._places.pop(name, None)
        else:
            self._in_force[name] = in_force
            self._places[name] = Place(self.module, name)
        notes = [self._in_force[name] for name in sorted(self._in_force)]
        frozen = [note.key for note in notes if note.key]
        digest = hashlib.sha256(" ".join(frozen).encode()).hexdigest()[:16] if frozen else ""
        unshared = [name for name in sorted(self._in_force) if self._in_force[name].unshared]
        self._mark = f"{' '.join(unshared)}|{digest}"
        self._needs_rows = self._row_order.needed = any(note.needs_rows for note in notes)
        self._on_stale = max((note.on_stale for note in notes), key=("ignore", "warn", "error").index, default="ignore")
        if not notes:
            self.detach()
        elif not self.in_force():
            self.detach()
            self.attach()

    def attach(self) -> None:
        super().attach()
        if self.composite:
            self.composite.attach()

    def detach(self) -> None:
        super().detach()
        if self.composite:
            self.composite.detach()

    def refuse_if_covered(self) -> None:
        super().refuse_if_covered()
        if self.composite:
            self.composite.refuse_if_covered()

    def told_by(self, module: nn.Module) -> None:
        """Asks `module`, around the stack, which tokens are padding where the stack is not told."""
        if self.composite is None:
            self.composite = Composite(module)
            if self.in_force():
                self.composite.attach()

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "write_index" in kwargs:
            raise InterventionError(
                "continuous batching (generate_batch) runs parts of several sequences in one row, on pages that may be "
                "filled without this freeze: their columns, statistics and heads cannot be told; use generate()"
            )
        named = self._arguments.named(args, kwargs)
        if named.get("cache") is not None:
            raise InterventionError(
                f"{type(self.module).__name__} takes a cache of its own kind, cache=, to which it cannot be told "
                "what a pass adds: run without one"
            )
        cache = named.get("past_key_values")
        if cache is not None and not hasattr(cache, "get_seq_length"):
            raise InterventionError(
                f"past_key_values is a {type(cache).__name__}: the tokens in it cannot be counted, nor can it be told "
                "under which freeze it was filled; pass a cache of transformers (DynamicCache), or run without one"
            )
        running = self._pass(cache, named)
        covered = self._covered()
        before = running.cached + running.cross_cached
        if before:
            check_cache(cache, self._mark, running.cached, self._on_stale)
        elif cache is not None:
            check_emptied_cache(cache, self._mark)
        if self.module.training:
            with self._checkpoints_keep(running):
                output = self._run_in(running, self.original, args, kwargs)
        else:
            output = self._run_in(running, self.original, args, kwargs)
        for name in covered:
            if name not in running.ran:
                raise FreezeNotInForceError(self._replaced(name))
        cache = cache if cache is not None else _cache_of(output)
        if cache is not None:
            # Counted, not asked for again: a static cache on an accelerator would be waited for.
            mark_cache(cache, self._mark, before, running.end if running.end > running.cached else filled(cache))
            if self._needs_rows:
                refuse_reordering(cache, self._row_order)
        elif self._needs_rows and not torch.compiler.is_compiling():
            self._row_order.check(named.get("input_ids"))
        return output

    def _covered(self) -> list[str]:
        """The frozen attentions on which, or around which, something was put since; it may well run them.

        Or their own forward was put back (an offloading undone, say), which does not.

        Raises:
            FreezeNotInForceError: one is no longer what the model runs.
        """
        covered = []
        for name, place in self._places.items():
            if place.lost():
                raise FreezeNotInForceError(self._replaced(name))
            if place.covered():
                covered.append(name)
        return covered

    def _replaced(self, name: str) -> str:
        return (
            f"{name} of {type(self.module).__name__} was wrapped or replaced after the freeze, so that what runs is "
            "not frozen: remove the freeze, then freeze what is there now"
        )

    def _pass(self, cache: Any, named: Mapping[str, Any]) -> Pass:
        given = named.get("input_ids")
        if given is None:
            given = named.get("inputs_embeds")
            tokens = 0 if given is None else given.shape[-2]  # an encoder of sounds counts its own columns from 0
        else:
            tokens = given.shape[min(1, given.dim() - 1)]  # [batch, token], some with codebooks behind
        rows = 0 if given is None else given.shape[0]
        states, encoder = named.get("encoder_hidden_states"), None
        if states is not None:
            encoder = Pass(named.get("encoder_attention_mask"), 0, states.shape[1], rows=len(states))
        cross_cached = cache is not None and any(getattr(cache, "is_updated", {}).values())
        masks = self._arguments.given("attention_mask", named)
        mask = told([*masks, *self.composite.given] if self.composite else masks, self._prompt)
        cached = 0 if cache is None else filled(cache)
        if self._prompt:  # it is given all tokens again at each step, and puts its own in front
            tokens += self._prompt - cached
        return Pass(mask, cached, tokens, encoder, cross_cached, rows)

    def _run_in(
        self, running: Pass, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        outer, self.current = self.current, running
        try:
            return function(*args, **kwargs)
        finally:
            self.current = outer

    @contextmanager
    def _checkpoints_keep(self, running: Pass) -> Iterator[None]:
        """Gradient checkpointing runs layers again in the backward pass: let each do so in the pass it came from."""
        name = "_gradient_checkpointing_func"
        originals = {module: vars(module)[name] for module in self.module.modules() if name in vars(module)}
        for module, original in originals.items():
            setattr(module, name, self._keeping(running, original))
        try:
            yield
        finally:
            for module, original in originals.items():
                setattr(module, name, original)

    def _wiring(self) -> list[tuple[str, tuple[object, ...]]]:
        return sorted((name, note.wiring) for name, note in self._in_force.items())

    def _keeping(self, running: Pass, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        wiring = self._wiring()

        def keeping(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            runs = dict(running.runs)

            def layer(*inner: Any, **options: Any) -> Any:
                running.runs = dict(runs)  # run again, it is the same run
                if self._wiring() != wiring:
                    raise FreezeNotInForceError(
                        "gradient checkpointing runs a layer again under other freezes than it first ran under: call "
                        "backward while the same freezes are live, inside the same `with`"
                    )
                return self._run_in(running, function, inner, options)

            return checkpoint(layer, *args, **kwargs)

        return keeping


def _cache_of(output: Any) -> Any:
    """The cache that a pass has made: by name, or among what was returned as a tuple."""
    cache = getattr(output, "past_key_values", None)
    if hasattr(cache, "get_seq_length"):
        return cache
    several = output if isinstance(output, tuple) else ()
    return next((one for one in several if hasattr(one, "get_seq_length")), None)


def tracker_of(stack: nn.Module, composite: nn.Module | None) -> PassTracker:
    """What tracks the passes of `stack`, inside `composite` if that is one, now, or something that can."""
    tracker = standing_in(stack, PassTracker) or PassTracker(stack)
    if composite is not None:
        tracker.told_by(composite)
    return tracker
