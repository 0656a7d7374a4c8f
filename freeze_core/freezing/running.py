"""The forward pass that is running: what a freeze needs to know of it beyond the activation itself."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from freeze_core.errors import FreezeNotInForceError, InterventionError
from freeze_core.freezing.caches import check_cache, check_emptied_cache, filled, mark_cache
from freeze_core.freezing.padding import PROMPT, Arguments, Composite, told
from freeze_core.freezing.replaced import ReplacedForward, standing_in
from freeze_core.freezing.rows import RowOrder, refuse_reordering
from freeze_core.freezing.traced import demand

__all__ = ["InForce", "Pass", "PassTracker", "tracker_of"]


class Pass:
    """One forward pass through a stack of decoder layers.

    Args:
        attention_mask: as the stack was given it: `None`, or `[batch, cached + token]` with 0 for padding.
        cached: tokens in the cache before this pass.
        tokens: tokens of this pass.
        encoder: the same of the encoder's states that cross-attention reads, if there are any.
        cross_cached: whether keys and values of those states are in the cache already.
        rows: of this pass; 0 where that is not told.
    """

    def __init__(
        self,
        attention_mask: Any,
        cached: int = 0,
        tokens: int = 0,
        encoder: Pass | None = None,
        cross_cached: bool = False,
        rows: int = 0,
    ) -> None:
        self.attention_mask = attention_mask
        self.cached = cached
        self.encoder = encoder
        self.cross_cached = cross_cached
        self.end = cached + tokens
        self.rows = rows

    def turned(self, x: Tensor) -> bool:
        """Whether an activation is `[token, batch, feature]`; that it is cannot be seen where there are as many."""
        tokens = self.end - self.cached
        return x.shape[:2] == (tokens, self.rows) and tokens != self.rows

    def column(self, tokens: int) -> int:
        """The column of the first of `tokens` activations: they end with the pass, or begin with the cache.

        Raises:
            InterventionError: there is a cache, and the model does not say how many tokens this pass adds to it.
        """
        if self.cached and self.end == self.cached:
            raise InterventionError(
                f"this pass goes on after {self.cached} cached tokens, and how many it has is not told, since the "
                "model has no argument input_ids or inputs_embeds, so that noise would be drawn for other columns: run "
                "without a cache"
            )
        return max(0, self.end - tokens)

    def real(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """`x` `[batch, token, feature]` and which positions are not padding, `[batch, token]` bool; `None` is all.

        Raises:
            InterventionError: the mask is not a padding mask for these positions, so that padding cannot be told.
        """
        mask, fault = self._padding_mask()
        if mask is not None and mask.shape != x.shape[:2]:
            fault = (
                f"attention_mask is {list(mask.shape)} and the activations are {list(x.shape[:2])} [batch, token]: "
                "statistics of the pass need a mask of the same shape"
            )
        return demand(x, not fault, fault), None if fault else mask

    def without_padding(self, x: Tensor) -> Tensor:
        """`x` `[batch, token, feature]`, if each of its rows can be taken from another one.

        Raises:
            InterventionError: there is only one, or there is padding.
        """
        (mask, fault), rows = self._padding_mask(), len(x)
        return demand(
            demand(x, not fault, fault),
            rows > 1 and (mask is None or mask.all()),
            f"freeze_type 'resample' takes the same column of another row, and this pass has {rows} row"
            f"{'s with padding' if rows > 1 else ''}: give at least two rows of the same length, without padding",
        )

    def padded_alike(self, x: Tensor, recorded: Tensor | None) -> Tensor:
        """`x`, what was recorded, if this pass pads as the one did whose `attention_mask` was `recorded`.

        Raises:
            InterventionError: it does not.
        """
        mask, fault = self._padding_mask()
        x = demand(x, not fault, fault)
        if fault or (recorded is None and mask is None):
            return x
        mask = torch.ones((), dtype=torch.bool) if mask is None else mask
        before = torch.ones((), dtype=torch.bool) if recorded is None else recorded != 0
        alike = (
            0 in (before.dim(), mask.dim()) or before.shape[1:] == mask.shape[1:]
        )  # one that is not may be too short
        return demand(
            x,
            alike and (before.to(mask.device) == mask).all(),
            "the reference was recorded under another attention_mask than that of this pass: record it on inputs that "
            "are padded alike",
        )

    def _padding_mask(self) -> tuple[Tensor | None, str]:
        """What is not padding `[batch, token]` bool, `None` if nothing is; or why that cannot be told."""
        mask = self.attention_mask
        if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
            return None if mask is None else mask.bool(), ""
        shape = list(mask.shape) if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        return None, (
            f"attention_mask is {shape}: a freeze that depends on padding needs a padding mask [batch, token]; pass "
            "one, freeze through the very model that is given one, or freeze with zero or with noise_std"
        )


class InForce(NamedTuple):
    """What a frozen attention tells of itself.

    Args:
        attention: the attention module itself.
        key: what is frozen at which value, as text; nothing where nothing is.
        wiring: the same and what gradients do.
        unshared: whether each query head has KV heads of its own.
        needs_rows: whether rows must stay where they are between passes.
        on_stale: what to do about a foreign cache.
    """

    attention: nn.Module
    key: str
    wiring: tuple[object, ...]
    unshared: bool
    needs_rows: bool
    on_stale: str


ARGUMENTS = (
    "attention_mask",
    "past_key_values",
    "input_ids",
    "inputs_embeds",
    "encoder_hidden_states",
    "encoder_attention_mask",
)


class PassTracker(ReplacedForward):
    """Stands in for the forward of a stack of layers: knows the pass that runs through it, and marks its cache."""

    shows_signature = True

    def __init__(self, stack: nn.Module) -> None:
        super().__init__(stack)
        self._arguments = Arguments(self.original, *ARGUMENTS)
        self.current: Pass | None = None
        self.composite: Composite | None = None
        self._in_force: dict[str, InForce] = {}
        self._mark = ""
        self._unshared = self._needs_rows = False
        self._on_stale = "ignore"
        self._row_order = RowOrder()
        self._busy = threading.Lock()

    def put(self, name: str, in_force: InForce | None) -> None:
        """Notes what is in force in the attention at the path `name`; `None` is nothing. Attached while anything is."""
        if in_force is None:
            self._in_force.pop(name, None)
        else:
            self._in_force[name] = in_force
        notes = [self._in_force[name] for name in sorted(self._in_force)]
        frozen = [note.key for note in notes if note.key]
        digest = hashlib.sha256(" ".join(frozen).encode()).hexdigest()[:16] if frozen else ""
        unshared = [name for name in sorted(self._in_force) if self._in_force[name].unshared]
        self._mark = f"{' '.join(unshared)}|{digest}"
        self._needs_rows = any(note.needs_rows for note in notes)
        self._on_stale = max((note.on_stale for note in notes), key=("ignore", "warn", "error").index, default="ignore")
        if notes and not self.slot():
            self.attach()
        elif not notes and self.slot():
            self.detach()

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
            if self.slot():
                self.composite.attach()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._run(args, kwargs)
        if not self._busy.acquire(blocking=False):
            raise InterventionError(
                f"a frozen {type(self.module).__name__} is running already, in another thread: run a frozen model in "
                "one thread at a time"
            )
        try:
            return self._run(args, kwargs)
        finally:
            self._busy.release()

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "write_index" in kwargs:
            raise InterventionError(
                "continuous batching (generate_batch) runs parts of several sequences in one row, on pages that may be "
                "filled without this freeze: their columns, statistics and heads cannot be told; use generate()"
            )
        cache = self._arguments.find("past_key_values", args, kwargs)
        if cache is not None and not hasattr(cache, "get_seq_length"):
            raise InterventionError(
                f"past_key_values is a {type(cache).__name__}: the tokens in it cannot be counted, nor can it be told "
                "under which freeze it was filled; pass a cache of transformers (DynamicCache), or run without one"
            )
        running = self._pass(cache, args, kwargs)
        self._refuse_replaced()
        before = running.cached + running.cross_cached
        if before:
            check_cache(cache, self._mark, running.cached, self._on_stale)
        elif cache is not None:
            check_emptied_cache(cache, self._mark)
        with self._running(running), self._checkpoints_keep(running):
            output = self.original(*args, **kwargs)
        cache = cache if cache is not None else _cache_of(output)
        if cache is not None:
            # Counted, not asked for again: a static cache on an accelerator would be waited for.
            mark_cache(cache, self._mark, before, running.end if running.end > running.cached else filled(cache))
            if self._needs_rows:
                refuse_reordering(cache)
        elif self._needs_rows and not torch.compiler.is_compiling():
            self._row_order.check(self._arguments.find("input_ids", args, kwargs))
        return output

    def _refuse_replaced(self) -> None:
        """Raises `FreezeNotInForceError` where a frozen attention is no longer what the model runs."""
        for name, note in self._in_force.items():
            # Its own forward was put back (an offloading undone, say); one put on top may well run the frozen one.
            unfrozen = getattr(note.attention.forward, "__self__", None) is note.attention
            if unfrozen or self.module.get_submodule(name) is not note.attention:
                raise FreezeNotInForceError(
                    f"{name} of {type(self.module).__name__} was wrapped or replaced after the freeze, so that what "
                    "runs is not frozen: remove the freeze, then freeze what is there now"
                )

    def _pass(self, cache: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pass:
        given = self._arguments.find("input_ids", args, kwargs)
        if given is None:
            given = self._arguments.find("inputs_embeds", args, kwargs)
            tokens = 0 if given is None else given.shape[-2]  # an encoder of sounds counts its own columns from 0
        else:
            tokens = given.shape[min(1, given.dim() - 1)]  # [batch, token], some with codebooks behind
        rows = 0 if given is None else given.shape[0]
        states = self._arguments.find("encoder_hidden_states", args, kwargs)
        encoder = None
        if states is not None:
            encoder = Pass(
                self._arguments.find("encoder_attention_mask", args, kwargs), 0, states.shape[1], rows=len(states)
            )
        cross_cached = any(getattr(cache, "is_updated", {}).values())
        masks = self._arguments.given("attention_mask", args, kwargs)
        mask = told(masks + (self.composite.given if self.composite else []), self.module)
        cached = filled(cache)
        if hasattr(self.module, PROMPT):  # it is given all tokens again at each step, and puts its own in front
            tokens += getattr(self.module, PROMPT) - cached
        return Pass(mask, cached, tokens, encoder, cross_cached, rows)

    @contextmanager
    def _running(self, running: Pass) -> Iterator[None]:
        outer, self.current = self.current, running
        try:
            yield
        finally:
            self.current = outer

    @contextmanager
    def _checkpoints_keep(self, running: Pass) -> Iterator[None]:
        """Gradient checkpointing runs layers again in the backward pass: let each do so in the pass it came from."""
        if not self.module.training:
            yield
            return
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
            def layer(*inner: Any, **options: Any) -> Any:
                if self._wiring() != wiring:
                    raise FreezeNotInForceError(
                        "gradient checkpointing runs a layer again under other freezes than it first ran under: call "
                        "backward while the same freezes are live, inside the same `with`"
                    )
                with self._running(running):
                    return function(*inner, **options)

            return checkpoint(layer, *args, **kwargs)

        return keeping


def _cache_of(output: Any) -> Any:
    """The cache that a pass has made: by name, or among what was returned as a tuple."""
    several = (getattr(output, "past_key_values", None), *(output if isinstance(output, tuple) else ()))
    return next((one for one in several if hasattr(one, "get_seq_length")), None)


def tracker_of(stack: nn.Module, composite: nn.Module | None) -> PassTracker:
    """What tracks the passes of `stack`, inside `composite` if that is one, now, or something that can."""
    standing = standing_in(stack)
    tracker = standing if isinstance(standing, PassTracker) else PassTracker(stack)
    if composite is not None:
        tracker.told_by(composite)
    return tracker
