"""Follows the passes of a stack of layers: which one is running, and what its cache is filled under."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from freeze_core.errors import InterventionError
from freeze_core.forward_patch import PassPatch, patch_on
from freeze_core.freezing.attention_state import StateWatch
from freeze_core.freezing.caches import check_cache, check_emptied_cache, filled, mark_cache
from freeze_core.freezing.encoder_outputs import EncoderDecoderPatch
from freeze_core.freezing.guards import (
    CONTINUOUS_BATCHING,
    cache_buffers,
    check_paths,
    refuse_foreign_recomputation,
    refuse_kept_tokens,
    refuse_recomputed_tokens,
    refuse_unfrozen,
    refuse_written_buffers,
)
from freeze_core.freezing.module_path import ModulePath
from freeze_core.freezing.padding_mask import Composite, given_masks, prompt_of, select_padding_mask
from freeze_core.freezing.pass_arguments import ForwardArguments, find_cache, returned_cache
from freeze_core.freezing.passes import Pass
from freeze_core.freezing.recomputation import may_be_checkpointed, wrap_checkpoints, wrapped_functions
from freeze_core.freezing.row_order import RowOrder, refuse_reordering

__all__ = ["InForce", "PassTracker", "tracker_of"]


class InForce(NamedTuple):
    """What a pass needs to know of the freezes of one layer.

    Args:
        module: the attention, or the layer, in which they are.
        key: what is frozen at which value, as text; empty where nothing is.
        treatments: the same and what gradients do.
        per_head_kv: whether each query head has KV heads of its own.
        reads_other_rows: whether rows must stay where they are between passes.
        on_stale: what to do about a cache that was filled under other freezes.
    """

    module: nn.Module
    key: str
    treatments: tuple[object, ...]
    per_head_kv: bool = False
    reads_other_rows: bool = False
    on_stale: str = "ignore"


class PassTracker(PassPatch):
    """Stands in for the forward of a stack of layers: knows the pass that runs through it, and marks its cache."""

    def __init__(self, stack: nn.Module) -> None:
        super().__init__(stack)
        self._arguments = ForwardArguments(stack, self.original)
        self.current: Pass | None = None
        self.composite: Composite | None = None
        self.encoder_decoder: EncoderDecoderPatch | None = None
        self._prompt = prompt_of(stack)
        self._in_force: dict[str, InForce] = {}
        self._paths: dict[str, ModulePath] = {}
        self._buffers: list[tuple[str, Tensor]] = []
        self._state_watch: StateWatch | None = None
        self._mark = ""
        self._reads_other_rows = False
        self._on_stale = "ignore"
        self._row_order = RowOrder()
        self.recomputing = False
        """Whether what runs now runs again for its gradient, under the freezes that it first ran under."""

    def put(self, name: str, in_force: InForce | None) -> None:
        """Notes what is in force in the attention at the path `name`; `None` is nothing. Attached while anything is."""
        if in_force is None:
            self._in_force.pop(name, None)
            self._paths.pop(name, None)
        else:
            self._in_force[name] = in_force
            self._paths[name] = ModulePath(self.module, name)
        notes = [self._in_force[name] for name in sorted(self._in_force)]
        self._buffers = [pair for name, note in self._in_force.items() for pair in cache_buffers(name, note.module)]
        self._state_watch = None
        frozen = [note.key for note in notes if note.key]
        digest = hashlib.sha256(" ".join(frozen).encode()).hexdigest()[:16] if frozen else ""
        per_head_kv = [name for name in sorted(self._in_force) if self._in_force[name].per_head_kv]
        self._mark = f"{' '.join(per_head_kv)}|{digest}"
        self._reads_other_rows = self._row_order.needed = any(note.reads_other_rows for note in notes)
        self._on_stale = max((note.on_stale for note in notes), key=("ignore", "warn", "error").index, default="ignore")
        if self.encoder_decoder:
            self.encoder_decoder.set_mark(digest, self._on_stale)
        if not notes:
            self.detach()
        elif not self.in_force():
            self.detach()
            self.attach()

    @property
    def _around(self) -> list[PassPatch]:
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

    def watch_mask_of(self, module: nn.Module) -> None:
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
            raise InterventionError(CONTINUOUS_BATCHING)
        named = self._arguments.bind(args, kwargs)
        cache = find_cache(named, type(self.module).__name__)
        running = self._pass(cache, named)
        if not torch.compiler.is_compiling():
            running.differentiated = torch.is_grad_enabled()
            refuse_foreign_recomputation(type(self.module).__name__, self.recomputing)
            if may_be_checkpointed(not torch.is_inference_mode_enabled()):
                wrap_checkpoints(self, running)
        covered = check_paths(self._paths, self.module)
        before = running.cached + running.cross_cached
        if before:
            check_cache(cache, self._mark, running.cached, self._on_stale)
        elif cache is not None:
            check_emptied_cache(cache, self._mark)
        versions = [buffer._version for _, buffer in self._buffers]
        watch = None if cache is not None or torch.compiler.is_compiling() else self._watch_state()
        sizes = watch.sizes() if watch else {}
        with wrapped_functions(self, running) if self.module.training else nullcontext():
            output = self.run_in(running, self.original, args, kwargs)
        refuse_unfrozen(covered, self.module, running)
        refuse_written_buffers(self.module, self._buffers, versions)
        if watch and sizes:  # beside a cache, what grows is a pattern of the last step, say
            refuse_kept_tokens(self.module, watch, sizes, named)
        if cache is None:
            cache = returned_cache(output)
        elif not self._prompt:
            refuse_recomputed_tokens(self.module, cache, running)
        if cache is not None:
            # Counted, not asked for again: a static cache on an accelerator would be waited for.
            mark_cache(cache, self._mark, before, running.end if running.end > running.cached else filled(cache))
            if self._reads_other_rows:
                refuse_reordering(cache, self._row_order)
        elif self._reads_other_rows and not torch.compiler.is_compiling():
            self._row_order.check(named.get("input_ids"))
        return output

    def _watch_state(self) -> StateWatch:
        """What watches the tensors that frozen attentions keep on themselves."""
        if self._state_watch is None:
            self._state_watch = StateWatch(self.module, list(self._in_force))
        return self._state_watch

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
        mask = select_padding_mask([*masks, *self.composite.masks] if self.composite else masks, self._prompt)
        cached = 0 if cache is None else filled(cache)
        if self._prompt:  # it is given all tokens again at each step, and puts its own in front
            tokens += self._prompt - cached
        return Pass(mask, cached, tokens, encoder, cross_cached, rows)

    def run_in(
        self, running: Pass | None, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What `function` gives, with `running` as the pass that frozen modules see."""
        outer, self.current = self.current, running
        try:
            return function(*args, **kwargs)
        finally:
            self.current = outer

    def treatments(self) -> list[tuple[str, tuple[object, ...]]]:
        """What is done in each layer, by its path: equal where a layer that runs again gives the same."""
        return sorted((name, note.treatments) for name, note in self._in_force.items())


def tracker_of(
    stack: nn.Module, composite: nn.Module | None, encoder_decoder: tuple[nn.Module, nn.Module] | None = None
) -> PassTracker:
    """What tracks the passes of `stack`, inside `composite` if that is one, now, or something that can.

    Args:
        encoder_decoder: where the stack is an encoder's, as `Sites.encoder_decoder` has it.
    """
    tracker = patch_on(stack, PassTracker) or PassTracker(stack)
    if composite is not None:
        tracker.watch_mask_of(composite)
    if encoder_decoder is not None:
        tracker.watch_encoder_outputs(*encoder_decoder)
    return tracker
