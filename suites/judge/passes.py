"""Runs one pass and keeps what attention consumed in it, in canonical form for every architecture.

Queries, keys and values are taken where all families meet, at `scaled_dot_product_attention`; z at the input of the
output projection; patterns from the model's own `output_attentions`. Nothing here knows how an engine works or how a
family stores its heads, and all of it lies downstream of a freeze.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.judge.anatomy import CannotJudge, Role, Site, sites

if TYPE_CHECKING:
    from freeze_core import InterventionConfig
    from pytest_circuitfreeze.engines import Engine

__all__ = ["Pass", "Seen", "attention_implementation", "look", "observe", "pads_under_eager"]


@dataclass
class Seen:
    """What one attention layer consumed and gave in one pass.

    Args:
        hidden: the attention module's input `[batch, token, model_dim]`.
        rotary: cosines and sines `[batch, token, feature]` that it was handed, if any.
        qkv: queries, keys and values as used, `[batch, head, token, head_dim]`, one KV head a query head or one a
            group; under sdpa only.
        probes: zeros that were added to `qkv`; after a backward pass their gradients are those of `qkv`.
        z: input of the output projection `[batch, token, head, head_dim]`.
        pattern: `[batch, head, query, key]`, if asked for.
    """

    hidden: Tensor
    rotary: tuple[Tensor, Tensor] | None
    qkv: dict[Role, Tensor] = field(default_factory=dict)
    probes: dict[Role, Tensor] = field(default_factory=dict)
    z: Tensor | None = None
    pattern: Tensor | None = None

    def mixed(self) -> Tensor:
        """`z`, which every pass has."""
        if self.z is None:
            raise CannotJudge("an attention layer ran without its output projection")
        return self.z


@dataclass
class Pass:
    """One pass: logits `[batch, token, vocabulary]` and what each attention layer consumed."""

    logits: Tensor
    layers: dict[int, Seen]


def look(
    engine: Engine,
    model: PreTrainedModel,
    config: InterventionConfig | Sequence[InterventionConfig] | None,
    batch: Batch,
    *,
    attn: str = "sdpa",
    patterns: bool = False,
) -> Pass:
    """One pass without gradients of `model` frozen by `engine` as `config` says; `None` is the unfrozen model."""
    with attention_implementation(model, attn), torch.no_grad():
        if config is None:
            return observe(model, model, batch, sites(model), patterns=patterns)
        known = sites(model)
        with engine.freeze(model, config) as frozen:
            return observe(frozen, model, batch, known, patterns=patterns)


def observe(
    call: Callable[..., Any],
    model: PreTrainedModel,
    batch: Batch,
    known: Mapping[int, Site],
    *,
    patterns: bool = False,
    gradients: bool = False,
) -> Pass:
    """Calls `call` on `batch` and keeps what the attention layers of `model` consumed.

    Args:
        call: the model or what an engine yields for it.
        known: the layers, as `sites` gave them before any freeze.
        patterns: ask the model for its patterns, too.
        gradients: make gradients with respect to `qkv` and `hidden` available after a backward pass.

    Raises:
        CannotJudge: under sdpa, attention did not run through `scaled_dot_product_attention` once a layer.
    """
    recorder = _Recorder(gradients)
    tapped = model.config._attn_implementation == "sdpa"
    with ExitStack() as stack:
        for site in known.values():
            stack.enter_context(recorder.attached(site))
        if tapped and not patterns:
            recorder.mode = _Tap(recorder)
            stack.callback(recorder.untap)
        asked = {"output_attentions": True} if patterns else {}
        output = call(**batch.arguments(model), **asked)
    if patterns:
        for layer, pattern in zip(sorted(known), output.attentions, strict=True):
            recorder.layers[layer].pattern = pattern
    elif tapped:
        _demand_all_tapped(known, recorder.layers)
    return Pass(output.logits, recorder.layers)


def pads_under_eager(model: PreTrainedModel) -> bool:
    """Whether eager attention can be shown padding.

    Not in float64: several families overflow their mask in a float32 softmax there and give nan on left padding,
    without any freeze.
    """
    return bool(model.dtype != torch.float64)


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Runs `model` with another attention implementation, `"eager"` or `"sdpa"`, for the length of the block.

    The configs' own field is set, which every family reads at each pass: `set_attn_implementation` refuses Falcon.
    """
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = name
        yield
    finally:
        for config, old in before:
            config._attn_implementation = old


# Torch's own, whatever may have been put in its place.
_ATTENTION = F.scaled_dot_product_attention


class _Recorder:
    """Keeps what passes; knows which layer is running."""

    def __init__(self, gradients: bool) -> None:
        self.gradients = gradients
        self.layers: dict[int, Seen] = {}
        self.running: Site | None = None
        self.mode: TorchFunctionMode | None = None
        self.tapping: TorchFunctionMode | None = None

    @contextmanager
    def attached(self, site: Site) -> Iterator[None]:
        handles = [
            site.module.register_forward_pre_hook(self._enter(site), with_kwargs=True),
            site.module.register_forward_hook(self._leave),
            site.output.register_forward_pre_hook(self._mix(site)),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, site: Site) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            hidden = args[0] if args else kwargs["hidden_states"]
            if self.gradients:  # a node of its own: other readers of the same tensor add nothing to its gradient
                hidden = hidden.view_as(hidden)
                hidden.retain_grad()
                args, kwargs = ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
            self.running = site
            if self.mode is not None:  # on in attention alone: it slows down every function that it sees
                self.tapping = self.mode.__enter__()
            rotary = kwargs.get("position_embeddings") if site.family.rotary else None
            self.layers[site.layer] = Seen(hidden, rotary)
            return args, kwargs

        return hook

    def _leave(self, *_: object) -> None:
        self.running = None
        self.untap()

    def untap(self) -> None:
        """Ends the tap of the layer that runs, if any: also of one that raised."""
        if self.tapping is not None:
            self.tapping.__exit__(None, None, None)
            self.tapping = None

    def _mix(self, site: Site) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.layers[site.layer].z = args[0].unflatten(-1, (site.heads, site.head_dim))

        return hook

    def tap(self, role: Role, used: Tensor) -> Tensor:
        if self.running is None:
            return used
        seen = self.layers[self.running.layer]
        if role in seen.qkv:
            raise CannotJudge(f"attention ran twice in layer {self.running.layer}; the judge cannot tell which counts")
        if self.gradients:
            seen.probes[role] = torch.zeros_like(used, requires_grad=True)
            used = used + seen.probes[role]
        seen.qkv[role] = used
        return used


class _Tap(TorchFunctionMode):
    """Sees every `scaled_dot_product_attention`."""

    def __init__(self, recorder: _Recorder) -> None:
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


def _demand_all_tapped(known: Mapping[int, Site], layers: Mapping[int, Seen]) -> None:
    missed = [layer for layer in known if layer not in layers or "v" not in layers[layer].qkv]
    if missed:
        raise CannotJudge(f"attention of layers {missed} did not call scaled_dot_product_attention under sdpa")
