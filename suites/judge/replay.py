"""What a frozen attention layer should have computed, by running the unfrozen one again on the same input.

The oracle of layers that have no formula. The clean attention module is called as it was called in the frozen pass,
while hooks put the contract's replacement at the features that the site names; so rotations, norms, gates, sinks,
windows and latents are the model's own. Where heads are treated unlike, everything is treated as one head's q, k and v
are, and z is read of the heads that are treated so: no KV head is ever un-shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pytest_circuitfreeze.suites.judge.expected_replacements import Material
from pytest_circuitfreeze.suites.judge.judged_sites import ROLES, CannotJudge, Site
from pytest_circuitfreeze.suites.judge.layer_calls import Call, OutputReached, fits_pattern
from pytest_circuitfreeze.suites.judge.observed_passes import attention_implementation
from pytest_circuitfreeze.suites.judge.oracle import blend, chosen_heads, untouched
from pytest_circuitfreeze.suites.judge.recorder import PatternTap, Seen
from pytest_circuitfreeze.suites.judge.rounding import NudgedAttention
from pytest_circuitfreeze.suites.judge.site_lookup import tied_parameters
from pytest_circuitfreeze.suites.tolerance import Exact, Nudge, nudged
from pytest_circuitfreeze.wrapped import config_of

if TYPE_CHECKING:
    from freeze_core import InterventionConfig

__all__ = ["Replay"]

Treatment = tuple[int | None, int | None, int | None]
"""For q, k and v of a head, which config decides; `None` is left alone."""


@dataclass(frozen=True, eq=False)
class Replay:
    """One layer of one frozen pass, to be run again.

    Args:
        model: unfrozen.
        site: the layer.
        seen: what it was called with in the frozen pass.
        real: `[batch, token]` bool, true where a token is not padding.
        configs: in install order, the later one winning where they meet.
        material: what replacements are made of.
        rounding: run the model off by rounding, for a bound.
        spoiled: let nan arrive in the place of each gradient that is not 0: what is 0 all the same is so by the freeze.
    """

    model: PreTrainedModel
    site: Site
    seen: Seen
    real: Tensor
    configs: Sequence[InterventionConfig]
    material: Material
    rounding: bool = False
    spoiled: bool = False

    def values(self) -> tuple[Tensor, Tensor | None]:
        """z `[batch, token, head, feature]` and, under eager attention, the pattern `[batch, head, query, key]`."""
        with torch.no_grad(), self._module() as module:
            return self._heads(module, self.seen.call)

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the layer's input (`""`) and of its parameters (by name), given that of its answer."""
        with torch.enable_grad(), self._module() as module:
            hidden = self.seen.hidden.detach().clone().requires_grad_()
            call = self.seen.call.given(hidden)
            z, _ = self._heads(module, call)
            if any(str(config.backward_mode) == "circuit_ste" for config in self.configs):
                # Frozen for what reads z, untouched for what made it.
                spared, _ = replace(self, configs=untouched(self.configs))._heads(module, call)
                z = z.detach() + (spared - spared.detach())
            answer = self._answer(module, call, z)
            arrived = self.seen.answer.grad if self.seen.answer is not None else None
            if arrived is None:
                raise CannotJudge(f"no gradient reached the attention of layer {self.site.layer}")
            if self.spoiled:
                arrived = arrived.where(arrived == 0, torch.nan)
            total = (self._touch()(arrived, arrived.shape[-1]) * answer).sum()
            elsewhere = tied_parameters(self.model if not self.rounding else nudged(self.model))
            own = {name: one for name, one in module.named_parameters() if one.requires_grad and one not in elsewhere}
            leaves = {"": hidden} | own
            found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        # A parameter that the module only hands on has its gradient from elsewhere.
        return {name: one for name, one in zip(leaves, found, strict=True) if one is not None}

    def _touch(self) -> Nudge | Exact:
        return Nudge(self.seen.hidden.dtype) if self.rounding else Exact()

    @contextmanager
    def _module(self) -> Iterator[nn.Module]:
        """The clean module, or that of the model that is off by rounding."""
        if not self.rounding:
            yield self.site.module
            return
        twin = nudged(self.model)
        with attention_implementation(twin, config_of(self.model)._attn_implementation), NudgedAttention():
            yield twin.get_submodule(self.site.name)

    def _heads(self, module: nn.Module, call: Call) -> tuple[Tensor, Tensor | None]:
        """z and pattern of all heads, each from a run in which everything is treated as it is."""
        treatments = self._treatments()
        z: list[Tensor | None] = [None] * self.site.heads
        patterns: list[Tensor | None] = [None] * self.site.heads
        for treatment in dict.fromkeys(treatments):
            heads = [head for head, own in enumerate(treatments) if own == treatment]
            own, pattern = self._run(module, call, treatment, heads)
            for head in heads:
                z[head] = own[:, :, head]
                patterns[head] = None if pattern is None else pattern[:, head]
        touch, tokens = self._touch(), self.seen.hidden.shape[1]
        known = [pattern for pattern in patterns if pattern is not None]
        whole = torch.stack(known, dim=1) if len(known) == self.site.heads else None
        mixed = touch(torch.stack([one for one in z if one is not None], dim=2), tokens)
        return mixed, None if whole is None else touch(whole, tokens, whole.dtype)

    def _treatments(self) -> list[Treatment]:
        """What is done to what each query head reads."""
        deciding: list[list[int | None]] = [[None] * len(ROLES) for _ in range(self.site.heads)]
        for at, config in enumerate(self.configs):
            for column, role in enumerate(ROLES):
                for head in chosen_heads(self.site, config, role):
                    deciding[head][column] = at
        return [(q, k, v) for q, k, v in deciding]

    def _run(
        self, module: nn.Module, call: Call, treatment: Treatment, heads: list[int]
    ) -> tuple[Tensor, Tensor | None]:
        """z and pattern of a run that treats all that `heads` read in one way."""
        found: list[Tensor] = []
        patterns: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.append(args[0].unflatten(-1, (self.site.heads, -1)))
            raise OutputReached

        edits_by_path: dict[str, list[Callable[[Tensor], Tensor]]] = {}
        for column, role in enumerate(ROLES):
            deciding = treatment[column]
            for name in self.site.parts_of(role) if deciding is not None or self.rounding else ():
                config = None if deciding is None else self.configs[deciding]
                edits_by_path.setdefault(self.site.parts[name].path, []).append(self._edit(name, config, heads))
        eager = config_of(self.model)._attn_implementation == "eager"
        with ExitStack() as stack:
            for path, edits in edits_by_path.items():
                stack.callback(module.get_submodule(path).register_forward_hook(self._editing(edits)).remove)
            stack.callback(module.get_submodule(self.site.output_name).register_forward_pre_hook(stop).remove)
            stack.enter_context(PatternTap(patterns.append) if eager else nullcontext())
            again = call.held(keep=call.hidden)
            with suppress(OutputReached):
                module(*again.args, **again.kwargs)
        if not found:
            raise CannotJudge(f"layer {self.site.layer}, run again, did not reach its output projection")
        return found[0], self._pattern(patterns)

    def _pattern(self, seen: list[Tensor]) -> Tensor | None:
        batch, tokens = self.seen.hidden.shape[:2]
        heads = self.site.heads
        fits = [one for one in seen if fits_pattern(one, batch, tokens, heads)]
        return fits[-1].reshape(batch, heads, tokens, -1) if fits else None

    def _answer(self, module: nn.Module, call: Call, z: Tensor) -> Tensor:
        """What the module returns when its output projection is given `z`."""

        def put(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (z.reshape(args[0].shape), *args[1:])

        handle = module.get_submodule(self.site.output_name).register_forward_pre_hook(put)
        try:
            again = call.held(keep=call.hidden)
            result = module(*again.args, **again.kwargs)
        finally:
            handle.remove()
        answer: Tensor = result[0] if isinstance(result, tuple | list) else result
        return answer

    def _editing(self, edits: list[Callable[[Tensor], Tensor]]) -> Callable[..., Tensor]:
        def hook(_: nn.Module, args: Any, result: Tensor) -> Tensor:
            x = result.reshape(*self.seen.hidden.shape[:2], -1)
            for edit in edits:
                x = edit(x)
            return x.reshape(result.shape)

        return hook

    def _edit(self, name: str, config: InterventionConfig | None, heads: list[int]) -> Callable[[Tensor], Tensor]:
        """Freezes those features of a part that `heads` read; without a config only rounds them off."""
        part, touch = self.site.parts[name], self._touch()
        rows = [row for row, readers in enumerate(part.readers) if set(readers) & set(heads)]

        def edit(x: Tensor) -> Tensor:
            features = part.features[rows].flatten().to(x.device)
            own = touch(x[..., features], 4)
            if config is not None:
                r = self._replacement(name, rows, own.detach(), config)
                # In float64: near strength 1 hardly a digit of the difference would be left.
                own = touch(blend(own.double(), r.expand(own.shape), config, touch).to(x.dtype), 4)
            return x.index_copy(-1, features, own)

        return edit

    def _replacement(self, name: str, rows: list[int], x: Tensor, config: InterventionConfig) -> Tensor:
        """`r`, broadcastable to `x [batch, token, feature]`, in float64."""
        by_head, touch = x.unflatten(-1, (len(rows), -1)), Nudge(x.dtype) if self.rounding else Exact()
        r = self.material.replacement(self.site.layer, name, rows, by_head, self.real, config, touch, self.seen.run)
        return r.flatten(-2)
