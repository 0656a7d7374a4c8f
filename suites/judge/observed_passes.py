"""Runs one pass and keeps what attention consumed in it. Nothing here knows how an engine works."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.judge.judged_sites import CannotJudge, Site
from pytest_circuitfreeze.suites.judge.layer_calls import attention_implementation
from pytest_circuitfreeze.suites.judge.recorder import Recorder, Seen
from pytest_circuitfreeze.suites.judge.site_lookup import implementations, sites
from pytest_circuitfreeze.wrapped import config_of, dtype_of

if TYPE_CHECKING:
    from freeze_core import InterventionConfig
    from pytest_circuitfreeze.engines import Engine

__all__ = [
    "Pass",
    "Seen",
    "attention_implementation",
    "logits_of",
    "observe",
    "of_real_tokens",
    "pads_under_eager",
    "run_pass",
    "unfrozen",
]


@dataclass
class Pass:
    """One pass: logits `[batch, token, vocabulary]` and what each attention layer consumed, run by run."""

    logits: Tensor
    runs: dict[int, list[Seen]]

    @property
    def layers(self) -> dict[int, Seen]:
        """The first run of each layer, which in most models is the only one."""
        found = {layer: seen[0] for layer, seen in self.runs.items()}
        return _Watched(found) if isinstance(self.runs, _Watched) else found


def run_pass(
    engine: Engine,
    model: PreTrainedModel,
    config: InterventionConfig | Sequence[InterventionConfig] | None,
    batch: Batch,
    *,
    attn: str | None = None,
    patterns: bool = False,
) -> Pass:
    """One pass without gradients of `model` frozen by `engine` as `config` says; `None` is the unfrozen model.

    Where the engine runs another model in its place, that one is looked at, unfrozen, too.
    `attn` is the attention implementation, by default the first of `implementations`.
    """
    with attention_implementation(model, attn or implementations(model)[0]), torch.no_grad():
        known = sites(model)
        if config is None:
            return observe(unfrozen(engine, model), model, batch, known, patterns=patterns)
        with engine.freeze(model, config) as frozen:
            return observe(frozen, model, batch, known, patterns=patterns)


def unfrozen(engine: Engine, model: PreTrainedModel) -> Callable[..., Any]:
    """What `engine` runs of `model` without a freeze: itself, where the engine does not say otherwise."""
    stands_in = getattr(engine, "unfrozen", None)
    call: Callable[..., Any] = model if stands_in is None else stands_in(model)
    return call


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
        call: the model or what an engine yields for it; where hooks are lost on its way, it is called again.
        known: the layers, as `sites` gave them before any freeze.
        patterns: keep patterns, too; under eager attention.
        gradients: make gradients with respect to `qkv` and `hidden` available after a backward pass.

    Raises:
        CannotJudge: under sdpa, attention did not run through `scaled_dot_product_attention` once a layer.
    """
    stand_in: PreTrainedModel | None = getattr(call, "stand_in", None)
    if stand_in is not None:
        known = {layer: site.moved_to(stand_in) for layer, site in known.items()}
    with_formula = any(site.formula is not None for site in known.values())
    tapped = with_formula and config_of(model)._attn_implementation == "sdpa" and not patterns

    def run(watch: Callable[[Recorder, Site], AbstractContextManager[None]]) -> tuple[Any, Recorder]:
        recorder = Recorder(gradients, patterns)
        with ExitStack() as stack:
            for site in known.values():
                stack.enter_context(watch(recorder, site))
            if tapped:
                recorder.tap_attention()
            stack.callback(recorder.untap)
            return call(**batch.arguments(model)), recorder

    output, recorder = run(Recorder.attached)
    if recorder.lost:
        output, recorder = run(Recorder.wrapped)
    if stand_in is not None:  # its attention may be another: what cannot be seen is missed by those who ask for it
        return Pass(output.logits, _Watched(recorder.runs))
    if tapped:
        _demand_all_tapped(known, recorder.runs)
    return Pass(output.logits, recorder.runs)


class _Watched(dict[int, Any]):
    """What was seen of a model that runs in place of another, by layer."""

    def __missing__(self, layer: int) -> Any:
        raise CannotJudge(f"attention of layer {layer} did not run in the model that runs in place of this one")


def logits_of(call: Callable[..., Any], model: PreTrainedModel, batch: Batch) -> Tensor:
    """The logits `[batch, token, vocabulary]` of one pass that nobody looks into, gradients kept if they are on.

    Args:
        call: the model or what an engine yields for it.
    """
    with attention_implementation(model, implementations(model)[0]):
        logits: Tensor = call(**batch.arguments(model)).logits
    return logits.detach()


def of_real_tokens(logits: Tensor, batch: Batch) -> Tensor:
    """`logits [batch, token, vocabulary]` with zeros where `batch` is padded, which is left to the model."""
    return logits.where(batch.real[..., None].to(logits.device), 0.0)


def pads_under_eager(model: PreTrainedModel) -> bool:
    """Whether eager attention can be shown padding.

    Not in float64: several families overflow their mask in a float32 softmax there and give nan on left padding,
    without any freeze.
    """
    return bool(dtype_of(model) != torch.float64)


def _demand_all_tapped(known: Mapping[int, Site], runs: Mapping[int, Sequence[Seen]]) -> None:
    missed = [layer for layer in known if not all("v" in seen.qkv for seen in runs.get(layer, ())) or layer not in runs]
    if missed:
        raise CannotJudge(f"attention of layers {missed} did not call scaled_dot_product_attention under sdpa")
