"""Entering: a freeze is in force however its model is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.claims import Claim, ClaimBroken, Margin, NotApplicable, check
from pytest_circuitfreeze.suites.judge.decoding import cache_argument
from pytest_circuitfreeze.suites.judge.judged_sites import CannotJudge
from pytest_circuitfreeze.suites.judge.known_families import is_known
from pytest_circuitfreeze.suites.judge.observed_passes import attention_implementation, logits_of, unfrozen
from pytest_circuitfreeze.suites.judge.site_lookup import implementations
from pytest_circuitfreeze.suites.judge.visible_state import training_flags_kept, wrap_forward
from pytest_circuitfreeze.wrapped import config_of, forward_parameters

if TYPE_CHECKING:
    from freeze_core import InterventionConfig
    from pytest_circuitfreeze.engines import Engine

__all__ = ["check_every_way_in_is_frozen"]


@check
def check_every_way_in_is_frozen(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch
) -> Margin:
    """Under a freeze, each way to call the model gives the logits of a plain call, bit for bit.

    Token ids by keyword are the plain call. The others are those of `WAYS` that the unfrozen model takes, and gives
    the same logits for, and a plain call where somebody wrapped the base model's forward before the freeze, in a
    function whose signature says nothing of a padding mask or a cache.

    Raises:
        ClaimBroken: a way gives others.
        NotApplicable: the model has no other way.
    """
    claim = Claim("a freeze is in force however the model is called")
    with torch.no_grad(), attention_implementation(model, implementations(model)[0]):
        call = unfrozen(engine, model)
        plain = logits_of(call, model, batch)
        ways = [name for name, way in WAYS.items() if _is_open(way, call, model, batch, plain)]
        stack = getattr(model, "base_model", model)
        if not ways and stack is model:
            raise NotApplicable(f"{type(model).__name__} gives other logits for each other way to call it")
        with engine.freeze(model, config) as frozen:
            want = logits_of(frozen, model, batch)
            for name in ways:
                got = _called(claim, name, WAYS[name], frozen, model, batch)
                claim.same(f"logits {name}", got, want, "row position word")
        if stack is not model:
            take_off = wrap_forward(stack)
            try:
                with engine.freeze(model, config) as frozen:
                    got = _called(claim, BEHIND_A_WRAPPER, logits_of, frozen, model, batch)
            finally:
                take_off()
            claim.same(f"logits {BEHIND_A_WRAPPER}", got, want, "row position word")
    return claim.margin


BEHIND_A_WRAPPER = "behind a wrapper around the base model"


def _called(
    claim: Claim, name: str, way: Way, frozen: Callable[..., Any], model: PreTrainedModel, batch: Batch
) -> Tensor:
    """The logits of the frozen model, called in a way in which the unfrozen one can be called."""
    try:
        return way(frozen, model, batch)
    except Exception as error:  # whatever an engine fails with
        claim.broken(f"no logits {name}, but {type(error).__name__}: {error}")


def _is_open(way: Way, call: Callable[..., Any], model: PreTrainedModel, batch: Batch, plain: Tensor) -> bool:
    """Whether the unfrozen model takes that way, and comes to the same bits.

    Raises:
        CannotJudge: a family that takes each way does not: something was renamed, and must not drop out unseen.
    """
    try:
        Claim("").same("logits", way(call, model, batch), plain)
    except ClaimBroken:
        return False
    except Exception as error:  # whatever a model says to arguments that it does not take
        if is_known(model) and type(model).__module__.startswith("transformers."):
            raise CannotJudge(
                f"{type(model).__name__} can be called in each way, and raised {type(error).__name__}: {error}"
            ) from error
        return False
    return True


Way = Callable[[Callable[..., Any], PreTrainedModel, Batch], Tensor]
"""Calls a model, or what stands for it, on a batch: the logits `[batch, token, vocabulary]`."""


def _by_position(call: Callable[..., Any], model: PreTrainedModel, batch: Batch) -> Tensor:
    """What the model takes first, up to the mask, without names."""
    arguments = batch.arguments(model)
    known = [*forward_parameters(model).values()]
    last = max(number for number, one in enumerate(known) if one.name in ("input_ids", "attention_mask"))
    first = [arguments.pop(one.name, one.default) for one in known[: last + 1]]
    return _logits(call(*first, **arguments))


def _embedded(call: Callable[..., Any], model: PreTrainedModel, batch: Batch) -> Tensor:
    arguments = batch.arguments(model)
    embed: nn.Module = model.get_input_embeddings()
    return _logits(call(inputs_embeds=embed(arguments.pop("input_ids")), **arguments))


def _with_a_new_cache(call: Callable[..., Any], model: PreTrainedModel, batch: Batch) -> Tensor:
    return _logits(call(**{**batch.arguments(model), "use_cache": True}))


def _with_an_empty_cache(call: Callable[..., Any], model: PreTrainedModel, batch: Batch) -> Tensor:
    cache = DynamicCache(config=config_of(model))
    return _logits(call(**{**batch.arguments(model), "use_cache": True}, **cache_argument(model, cache)))


def _as_a_tuple(call: Callable[..., Any], model: PreTrainedModel, batch: Batch) -> Tensor:
    logits: Tensor = call(**batch.arguments(model), return_dict=False)[0]
    return logits


def _in_inference_mode(call: Callable[..., Any], model: PreTrainedModel, batch: Batch) -> Tensor:
    with torch.inference_mode():
        return _logits(call(**batch.arguments(model)))


def _in_training_mode(call: Callable[..., Any], model: PreTrainedModel, batch: Batch) -> Tensor:
    with training_flags_kept(model), torch.random.fork_rng(devices=[]):  # dropout draws
        model.train()
        return _logits(call(**batch.arguments(model)))


def _logits(output: Any) -> Tensor:
    logits: Tensor = output.logits
    return logits


WAYS: Mapping[str, Way] = {
    "of arguments by position": _by_position,
    "of embeddings": _embedded,
    "beside a new cache": _with_a_new_cache,
    "beside an empty cache of the caller's": _with_an_empty_cache,
    "in a tuple": _as_a_tuple,
    "in inference mode": _in_inference_mode,
    "in training mode": _in_training_mode,
}
"""Other ways to call a model than by keywords, by what messages say of their logits."""
