"""Keeps what attention layers consume and give in a pass.

Queries, keys and values are taken at the outputs of their projections and, where a formula says what becomes of them,
at `scaled_dot_product_attention`, too. z is the input of the output projection; patterns are what comes out of the
softmax under eager attention. All of it lies downstream of a freeze.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pytest_circuitfreeze.suites.judge.judged_sites import CannotJudge, Role, Site
from pytest_circuitfreeze.suites.judge.layer_calls import SOFTMAX, Call, fits_pattern, hidden_of

__all__ = ["PatternTap", "Recorder", "Seen", "Used"]


class Used(dict[Any, Tensor]):
    """What attention read, by role or part."""

    def __missing__(self, name: str) -> Tensor:
        raise CannotJudge(f"{name} was not seen: the model that ran has no such module, or attends in another way")


@dataclass
class Seen:
    """What one attention layer consumed and gave in one pass.

    Args:
        site: the layer.
        hidden: the attention module's input `[batch, token, model_dim]`.
        call: what the module was called with.
        qkv: queries, keys and values as used, `[batch, head, token, head_dim]`, one KV head a query head or one a
            group; under sdpa, where the site has a formula.
        probes: zeros that were added to `qkv`; after a backward pass their gradients are those of `qkv`.
        parts: by part, what its source gave of it, `[batch, token, head, feature]`, unless that has another width.
        answer: what it returned, or the first of it; after a backward pass it has its gradient.
        run: which run of the layer in its pass this was, 0 but for models that loop over their layers.
        z: input of the output projection `[batch, token, head, head_dim]`.
        pattern: `[batch, head, query, key]`, if asked for.
        shared: whether it left its keys and values for later layers to read.
    """

    site: Site
    hidden: Tensor
    call: Call
    qkv: dict[Role, Tensor] = field(default_factory=Used)
    probes: dict[Role, Tensor] = field(default_factory=dict)
    parts: dict[str, Tensor] = field(default_factory=Used)
    answer: Tensor | None = None
    run: int = 0
    z: Tensor | None = None
    pattern: Tensor | None = None
    shared: bool = False

    @property
    def rotary(self) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines `[batch, token, feature]` that the formula rotates by, if it does."""
        formula = self.site.formula
        return self.call.kwargs.get("position_embeddings") if formula is not None and formula.rotary else None

    def mixed(self) -> Tensor:
        """`z`, which every pass has."""
        if self.z is None:
            raise CannotJudge("an attention layer ran without its output projection")
        return self.z

    def consumed(self) -> Mapping[str, Tensor]:
        """All that was seen of q, k and v, `[batch, token, head, feature]`.

        One for each query head as attention reads it, where that was seen; elsewhere what their sources gave.
        """
        if not self.qkv:
            return self.parts
        heads = self.site.heads
        by_head = {role: used.repeat_interleave(heads // used.shape[1], dim=1) for role, used in self.qkv.items()}
        return {str(role): used.transpose(1, 2) for role, used in by_head.items()}

    def activation(self, name: str) -> Tensor:
        """A part's activation before any norm or rotation `[batch, token, head, feature]`, one for each head of it."""
        role, features = self.site.parts[name].role, self.site.parts[name].features
        if self.site.formula is None or role not in self.qkv:
            return self.parts[name]
        x = self.site.formula.unused(role, self.qkv[role].double(), self.rotary)
        return x[:, :, :: x.shape[2] // len(features)]


# Torch's own, whatever may have been put in its place.
_ATTENTION = F.scaled_dot_product_attention


class Recorder:
    """Keeps what passes; knows which layer is running.

    Args:
        gradients: make gradients available after a backward pass.
        patterns: keep what comes out of the softmax.
    """

    def __init__(self, gradients: bool = False, patterns: bool = False) -> None:
        self.gradients = gradients
        self.patterns = patterns
        self.runs: dict[int, list[Seen]] = {}
        self.running: Site | None = None
        self.lost = False
        """Whether somebody else has removed the hooks that watched a layer."""
        self.mode: TorchFunctionMode | None = PatternTap(self.keep_pattern) if patterns else None
        self.tapping: TorchFunctionMode | None = None

    def tap_attention(self) -> None:
        """From now on sees every `scaled_dot_product_attention`."""
        self.mode = _Tap(self)

    @contextmanager
    def attached(self, site: Site) -> Iterator[None]:
        """Watches one layer."""
        handles = [
            site.module.register_forward_pre_hook(self._enter(site), with_kwargs=True),
            site.module.register_forward_hook(self._leave(site), with_kwargs=True),
            site.output.register_forward_pre_hook(self._mix(site)),
            *(
                site.read_at(name).register_forward_hook(self._keep(site, name), with_kwargs=True)
                for name in site.parts
            ),
        ]
        try:
            yield
        finally:
            for handle in handles:
                self.lost |= handle.id not in (handle.hooks_dict_ref() or ())
                handle.remove()

    @contextmanager
    def wrapped(self, site: Site) -> Iterator[None]:
        """Watches one layer where hooks are removed: around the modules' own forwards."""
        enter, leave, mix = self._enter(site), self._leave(site), self._mix(site)
        with ExitStack() as stack:
            stack.enter_context(_around(site.module, enter, leave))
            stack.enter_context(_around(site.output, lambda module, args, _: mix(module, args)))
            for name in site.parts:
                stack.enter_context(_around(site.read_at(name), after=self._keep(site, name)))
            yield

    def _enter(self, site: Site) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            call = Call(args, kwargs)
            hidden = hidden_of(args, kwargs)
            if (
                self.gradients and torch.is_grad_enabled()
            ):  # a node of its own: other readers of the same tensor add nothing to its gradient
                # Where nothing before the layer learns, it starts here.
                hidden = hidden.view_as(hidden) if hidden.requires_grad else hidden.detach().requires_grad_()
                hidden.retain_grad()
                call = call.given(hidden)
            self.running = site
            if self.mode is not None:  # on in attention alone: it slows down every function that it sees
                self.tapping = self.mode.__enter__()
            before = self.runs.setdefault(site.layer, [])
            before.append(Seen(site, hidden, call.held(), run=len(before)))
            return call.args, call.kwargs

        return hook

    def _leave(self, site: Site) -> Callable[..., Any]:
        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any], result: Any) -> Any:
            self.running = None
            self.untap()
            if not self.gradients or not torch.is_grad_enabled():
                return result
            seen = self.runs[site.layer][-1]
            seen.shared = any(isinstance(value, MutableMapping) and value for value in kwargs.values())
            several = isinstance(result, tuple | list)
            first = result[0] if several else result
            if not first.requires_grad:  # nothing before it learns
                first = first.detach().requires_grad_()
            first.retain_grad()
            seen.answer = first
            # A copy goes on, so that what is written into it later leaves the gradient alone.
            return type(result)([first.clone(), *result[1:]]) if several else first.clone()

        return hook

    def untap(self) -> None:
        """Ends the tap of the layer that runs, if any: also of one that raised."""
        if self.tapping is not None:
            self.tapping.__exit__(None, None, None)
            self.tapping = None

    def _mix(self, site: Site) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if site.layer in self.runs:
                self.runs[site.layer][-1].z = args[0].unflatten(-1, (site.heads, -1))

        return hook

    def _keep(self, site: Site, name: str) -> Callable[..., None]:
        part = site.parts[name]

        def hook(_: nn.Module, args: Any, kwargs: Any, result: Tensor) -> None:
            seen = self.runs[site.layer][-1]
            whole = result.reshape(*seen.hidden.shape[:2], -1)
            if whole.shape[-1] == part.width:  # else KV heads are un-shared, in an order of the engine's own
                seen.parts[name] = whole[..., part.features.to(whole.device)]

        return hook

    def keep_pattern(self, pattern: Tensor) -> None:
        """Keeps a pattern of the layer that runs, `[batch, head, query, key]` or batch and head in one dimension."""
        if self.running is None:
            return
        seen, heads = self.runs[self.running.layer][-1], self.running.heads
        batch, tokens = seen.hidden.shape[:2]
        if fits_pattern(pattern, batch, tokens, heads):
            seen.pattern = pattern.reshape(batch, heads, tokens, -1)

    def tap(self, role: Role, used: Tensor) -> Tensor:
        """Keeps what attention reads of one role, and hands it on."""
        if self.running is None:
            return used
        seen = self.runs[self.running.layer][-1]
        if role in seen.qkv:
            raise CannotJudge(f"attention ran twice in layer {self.running.layer}; the judge cannot tell which counts")
        if self.gradients:
            seen.probes[role] = torch.zeros_like(used, requires_grad=True)
            used = used + seen.probes[role]
        seen.qkv[role] = used
        return used


@contextmanager
def _around(
    module: nn.Module, before: Callable[..., Any] | None = None, after: Callable[..., Any] | None = None
) -> Iterator[None]:
    """Calls `before(module, args, kwargs)` and `after(module, args, kwargs, result)`, as hooks, around a forward."""
    forward, own = module.forward, vars(module).get("forward")

    def watched(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = (before and before(module, args, kwargs)) or (args, kwargs)
        result = forward(*args, **kwargs)
        changed = after(module, args, kwargs, result) if after else None
        return result if changed is None else changed

    module.forward = watched
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


class _Tap(TorchFunctionMode):
    """Sees every `scaled_dot_product_attention`."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _ATTENTION:
            query, key, value, *rest = args
            tap = self.recorder.tap
            args = (tap("q", query), tap("k", key), tap("v", value), *rest)
        return func(*args, **(kwargs or {}))


class PatternTap(TorchFunctionMode):
    """Hands every result of a softmax to `keep`."""

    def __init__(self, keep: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.keep = keep

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in SOFTMAX and result.dim() in (3, 4):
            self.keep(result)
        return result
