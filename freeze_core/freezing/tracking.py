"""Follows the passes of a stack of layers: which one is running, and what its cache is filled under."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from freeze_core.errors import FreezeNotInForceError, InterventionError
from freeze_core.freezing.attention_state import StateWatch
from freeze_core.freezing.caches import check_cache, check_emptied_cache, filled, mark_cache
from freeze_core.freezing.encoder_outputs import EncoderDecoderPatch
from freeze_core.freezing.padding import Composite, given_masks, prompt_of, select_padding_mask
from freeze_core.freezing.pass_arguments import ForwardArguments, find_cache, holds_tensors, returned_cache
from freeze_core.freezing.passes import Pass
from freeze_core.freezing.places import Place
from freeze_core.freezing.recomputation import checkpoints, may_be_checkpointed
from freeze_core.freezing.replaced import ReplacedPass, standing_in
from freeze_core.freezing.rows import RowOrder, refuse_reordering

__all__ = ["UNFROZEN_BEFORE", "InForce", "PassTracker", "tracker_of"]


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


UNFROZEN_BEFORE = (
    "{what} is run again for its gradient, and its pass ran without this freeze: call backward before the freeze is "
    "installed"
)


class PassTracker(ReplacedPass):
    """Stands in for the forward of a stack of layers: knows the pass that runs through it, and marks its cache."""

    def __init__(self, stack: nn.Module) -> None:
        super().__init__(stack)
        self._arguments = ForwardArguments(stack, self.original)
        self.current: Pass | None = None
        self.composite: Composite | None = None
        self.encoder_decoder: EncoderDecoderPatch | None = None
        self._prompt = prompt_of(stack)
        self._in_force: dict[str, InForce] = {}
        self._places: dict[str, Place] = {}
        self._buffers: list[tuple[str, Tensor]] = []
        self._kept_keys: StateWatch | None = None
        self._mark = ""
        self._unshared = self._needs_rows = False
        self._on_stale = "ignore"
        self._row_order = RowOrder()
        self.recomputing = False
        """Whether what runs now runs again for its gradient, under the freezes that it first ran under."""

    def put(self, name: str, in_force: InForce | None) -> None:
        """Notes what is in force in the attention at the path `name`; `None` is nothing. Attached while anything is."""
        if in_force is None:
            self._in_force.pop(name, None)
            self._places.pop(name, None)
        else:
            self._in_force[name] = in_force
            self._places[name] = Place(self.module, name)
        notes = [self._in_force[name] for name in sorted(self._in_force)]
        self._buffers = [pair for name, note in self._in_force.items() for pair in _cache_buffers(name, note.attention)]
        self._kept_keys = None
        frozen = [note.key for note in notes if note.key]
        digest = hashlib.sha256(" ".join(frozen).encode()).hexdigest()[:16] if frozen else ""
        unshared = [name for name in sorted(self._in_force) if self._in_force[name].unshared]
        self._mark = f"{' '.join(unshared)}|{digest}"
        self._needs_rows = self._row_order.needed = any(note.needs_rows for note in notes)
        self._on_stale = max((note.on_stale for note in notes), key=("ignore", "warn", "error").index, default="ignore")
        if self.encoder_decoder:
            self.encoder_decoder.set_mark(digest, self._on_stale)
        if not notes:
            self.detach()
        elif not self.in_force():
            self.detach()
            self.attach()

    @property
    def _around(self) -> list[ReplacedPass]:
        """The patches of modules around the stack, which come and go with this one."""
        return [patch for patch in (self.composite, self.encoder_decoder) if patch]

    def attach(self) -> None:
        super().attach()
        for patch in self._around:
            patch.attach()

    def detach(self) -> None:
        super().detach()
        for patch in self._around:
            patch.detach()

    def refuse_if_covered(self) -> None:
        super().refuse_if_covered()
        for patch in self._around:
            patch.refuse_if_covered()

    def told_by(self, module: nn.Module) -> None:
        """Asks `module`, around the stack, which tokens are padding where the stack is not told."""
        if self.composite is None:
            self.composite = Composite(module)
            if self.in_force():
                self.composite.attach()

    def watch_encoder_outputs(self, module: nn.Module, encoder: nn.Module) -> None:
        """Has `module`, around the stack, checked for outputs of `encoder` that are older than the freeze."""
        if self.encoder_decoder is None:
            self.encoder_decoder = EncoderDecoderPatch(module, encoder)
            if self.in_force():
                self.encoder_decoder.attach()

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "write_index" in kwargs:
            raise InterventionError(
                "continuous batching (generate_batch) runs parts of several sequences in one row, on pages that may be "
                "filled without this freeze: their columns, statistics and heads cannot be told; use generate()"
            )
        named = self._arguments.bind(args, kwargs)
        cache = find_cache(named, type(self.module).__name__)
        running = self._pass(cache, named)
        if not torch.compiler.is_compiling():
            running.differentiated = torch.is_grad_enabled()
            self._refuse_recomputation()
            if may_be_checkpointed(not torch.is_inference_mode_enabled()):
                self._guard_checkpoints(running)
        covered = self._covered()
        before = running.cached + running.cross_cached
        if before:
            check_cache(cache, self._mark, running.cached, self._on_stale)
        elif cache is not None:
            check_emptied_cache(cache, self._mark)
        versions = [buffer._version for _, buffer in self._buffers]
        sizes = {} if torch.compiler.is_compiling() else self._kept_sizes()
        if self.module.training:
            with self._checkpoints_keep(running):
                output = self._run_in(running, self.original, args, kwargs)
        else:
            output = self._run_in(running, self.original, args, kwargs)
        for name in covered:
            if name not in running.ran:
                raise FreezeNotInForceError(self._replaced(name))
        if self._buffers:
            self._refuse_written_buffers(versions)
        if cache is not None:
            self._refuse_recomputed_tokens(cache, running)
            sizes = {}  # what grows beside a cache is a pattern of the last step, say
        else:
            cache = returned_cache(output)
        if sizes:
            self._refuse_kept_tokens(sizes, named)
        if cache is not None:
            # Counted, not asked for again: a static cache on an accelerator would be waited for.
            mark_cache(cache, self._mark, before, running.end if running.end > running.cached else filled(cache))
            if self._needs_rows:
                refuse_reordering(cache, self._row_order)
        elif self._needs_rows and not torch.compiler.is_compiling():
            self._row_order.check(named.get("input_ids"))
        return output

    def _refuse_written_buffers(self, versions: Sequence[int]) -> None:
        """Raises `InterventionError` where a pass wrote to a buffer of attention that may be a cache of its own."""
        for (name, buffer), version in zip(self._buffers, versions, strict=True):
            if buffer._version != version:
                raise InterventionError(
                    f"{name} of {type(self.module).__name__}, a buffer {list(buffer.shape)}, was written to in this "
                    "pass: if attention keeps keys and values there, how many tokens it holds and under which freeze "
                    "they were computed is unknown; hand over a cache of transformers (DynamicCache) instead, or take "
                    "the buffer out"
                )

    def _kept_sizes(self) -> dict[str, tuple[int, ...]]:
        """The sizes of what frozen attentions that are not transformers' own keep on themselves."""
        if self._kept_keys is None:
            self._kept_keys = StateWatch(self.module, list(self._in_force))
        return self._kept_keys.sizes()

    def _refuse_kept_tokens(self, before: Mapping[str, tuple[int, ...]], named: Mapping[str, Any]) -> None:
        """Raises `InterventionError` where what attention keeps on itself is longer by the tokens of this pass."""
        given = next((value for value in named.values() if isinstance(value, Tensor) and value.dim() > 1), None)
        if given is not None and self._kept_keys and (path := self._kept_keys.grown(before, given.shape[1])):
            raise InterventionError(
                f"{path} of {type(self.module).__name__} has grown by the {given.shape[1]} tokens of this pass: if "
                "attention keeps keys and values there, how many tokens it holds and under which freeze they were "
                "computed is unknown; hand over a cache of transformers (DynamicCache) instead, or empty it before "
                "each pass"
            )

    def _refuse_recomputed_tokens(self, cache: Any, running: Pass) -> None:
        """Raises `InterventionError` where a cache has not grown by the tokens that the pass was given.

        Such a model (XLM, say) is given its cached tokens again and leaves them out by itself, so that the columns of
        its activations are not those of the tokens. A cache of fixed size is not asked: on an accelerator that waits.
        """
        tokens = running.end - running.cached
        if self._prompt or not tokens or getattr(cache, "is_compileable", False):
            return
        grown = filled(cache) - running.cached
        if not grown and not running.cached and holds_tensors(cache):
            raise InterventionError(
                f"{type(self.module).__name__} was given a {type(cache).__name__} that holds tensors and says that it "
                "holds no tokens (get_seq_length): which columns a pass computes is unknown; pass a cache that counts "
                "its tokens, such as DynamicCache, or run without one"
            )
        if grown not in (0, tokens):
            raise InterventionError(
                f"{type(self.module).__name__} was given {tokens} tokens and added {grown} to its cache of "
                f"{running.cached}: which columns this pass computed is unknown; run without a cache (use_cache=False)"
            )

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
        masks = given_masks(self._arguments, named)
        mask = select_padding_mask([*masks, *self.composite.given] if self.composite else masks, self._prompt)
        cached = 0 if cache is None else filled(cache)
        if self._prompt:  # it is given all tokens again at each step, and puts its own in front
            tokens += self._prompt - cached
        return Pass(mask, cached, tokens, encoder, cross_cached, rows)

    def _run_in(
        self, running: Pass | None, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        outer, self.current = self.current, running
        try:
            return function(*args, **kwargs)
        finally:
            self.current = outer

    @contextmanager
    def _checkpoints_keep(self, running: Pass) -> Iterator[None]:
        """Lets layers that transformers or torch's wrappers checkpoint run again in the pass that they come from.

        `follow` does so for every checkpoint, but not where a layer is compiled: nothing looks around in there.
        """
        originals = [
            (module, name, vars(module)[name])
            for module in self.module.modules()
            for name in ("_gradient_checkpointing_func", "checkpoint_fn")
            if name in vars(module) and callable(vars(module)[name])
        ]
        for module, name, original in originals:
            setattr(module, name, self._keeping(running, original))
        try:
            yield
        finally:
            for module, name, original in originals:
                setattr(module, name, original)

    def _wiring(self) -> list[tuple[str, tuple[object, ...]]]:
        return sorted((name, note.wiring) for name, note in self._in_force.items())

    def _keeping(self, running: Pass, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def keeping(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return checkpoint(self._run_again(running, function), *args, **kwargs)

        return keeping

    def follow(self) -> bool:
        """Lets the checkpoints that a frozen module runs in run it again under the same freezes only, in this pass.

        Returns:
            whether one of them was not known yet.
        """
        running = self.current
        began = running.differentiated if running else not torch.compiler.is_compiling()
        return may_be_checkpointed(began) and bool(self._guard_checkpoints(running))

    # Not compiled: a compiled layer in what may be a reentrant checkpoint stops here and looks around. The public
    # torch.compiler.disable would import all of torch._dynamo with this library.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _guard_checkpoints(self, running: Pass | None) -> bool:
        new = False
        for checkpoint, attribute in checkpoints(type(self.module).__name__):
            guards = vars(checkpoint).setdefault("_circuitfreeze", [])
            if self not in guards:
                guards.append(self)
                setattr(checkpoint, attribute, self._run_again(running, getattr(checkpoint, attribute)))
                new = True
        return new

    def _run_again(self, running: Pass | None, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, which runs in the pass `running` now and when it is called again, under these freezes only."""
        wiring, turns = self._wiring(), running.turns() if running else None
        given = self.composite.given if self.composite else []

        def again(*args: Any, **kwargs: Any) -> Any:
            # The same freeze may have been removed and installed anew meanwhile.
            tracker = self if self._in_force else standing_in(self.module, PassTracker) or self
            if tracker._wiring() != wiring:
                raise FreezeNotInForceError(
                    "gradient checkpointing runs a layer again under other freezes than it first ran under: call "
                    "backward while the same freezes are live, inside the same `with`"
                )
            if running and turns:
                running.go_back(turns)  # run again, it is the same run
            return tracker._recompute(running, given, function, args, kwargs)

        return again

    def _recompute(
        self,
        running: Pass | None,
        given: list[Any],
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        before = self.recomputing, self.composite.given if self.composite else []
        self.recomputing = True
        if self.composite:
            self.composite.given = given
        try:
            return self._run_in(running, function, args, kwargs)
        finally:
            self.recomputing = before[0]
            if self.composite:
                self.composite.given = before[1]

    def _refuse_recomputation(self) -> None:
        """Raises `FreezeNotInForceError` if the stack runs again for the gradient of a pass without these freezes."""
        if torch._C._current_graph_task_id() != -1 and not self.recomputing:
            raise FreezeNotInForceError(UNFROZEN_BEFORE.format(what=type(self.module).__name__))


def _cache_buffers(path: str, attention: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers of an attention that could hold keys and values of earlier passes, by their paths."""
    for name, buffer in attention.named_buffers(path):
        if buffer.is_floating_point() and buffer.dim() > 2 and not buffer.is_inference():
            yield name, buffer


def tracker_of(
    stack: nn.Module, composite: nn.Module | None, encoder_decoder: tuple[nn.Module, nn.Module] | None = None
) -> PassTracker:
    """What tracks the passes of `stack`, inside `composite` if that is one, now, or something that can.

    Args:
        encoder_decoder: where the stack is an encoder's, as `Sites.encoder_decoder` has it.
    """
    tracker = standing_in(stack, PassTracker) or PassTracker(stack)
    if composite is not None:
        tracker.told_by(composite)
    if encoder_decoder is not None:
        tracker.watch_encoder_outputs(*encoder_decoder)
    return tracker
