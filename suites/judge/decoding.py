"""Runs a batch piece by piece, each piece on the cache that those before it have filled."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.claims import NotApplicable
from pytest_circuitfreeze.suites.judge.passes import attention_implementation
from pytest_circuitfreeze.suites.judge.sites import implementations

if TYPE_CHECKING:
    from freeze_core import InterventionConfig
    from pytest_circuitfreeze.engines import Engine

__all__ = ["decode", "demand_decoding", "go_on"]


def go_on(
    call: Callable[..., Any], model: PreTrainedModel, batch: Batch, start: int, stop: int, cache: Any = None
) -> tuple[Tensor, Any]:
    """Runs the columns `start` to `stop` of `batch` on `cache`, which holds those before, or on a new one.

    Args:
        call: the model or what an engine yields for it.

    Returns:
        logits `[batch, stop - start, vocabulary]`, and the cache, which now holds these columns, too.

    Raises:
        NotApplicable: the model gives no cache.
    """
    given = batch.arguments(model)
    own: dict[str, Any] = {name: given[name][:, start:stop] for name in ("input_ids", "position_ids") if name in given}
    if "attention_mask" in given:
        own["attention_mask"] = given["attention_mask"][:, :stop]
    if cache is not None:
        own["past_key_values"] = cache
    output = call(**own, use_cache=True)
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        raise NotApplicable(f"{type(model).__name__} makes no cache")
    return output.logits, cache


def decode(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig | None, batch: Batch, ends: Sequence[int]
) -> Tensor:
    """The logits `[batch, token, vocabulary]` of the pieces of `batch` that end before the columns `ends`, in turn.

    `config` is frozen by `engine` meanwhile; `None` is the unfrozen model.
    """
    with attention_implementation(model, implementations(model)[0]), torch.no_grad():
        if config is None:
            return _pieces(model, model, batch, ends)
        with engine.freeze(model, config) as frozen:
            return _pieces(frozen, model, batch, ends)


def _pieces(call: Callable[..., Any], model: PreTrainedModel, batch: Batch, ends: Sequence[int]) -> Tensor:
    cache, found = None, []
    for start, stop in zip([0, *ends], ends, strict=False):
        logits, cache = go_on(call, model, batch, start, stop, cache)
        found.append(logits)
    return torch.cat(found, dim=1)


def demand_decoding(engine: Engine, model: PreTrainedModel, batch: Batch, ends: Sequence[int]) -> None:
    """Demands that the unfrozen model runs `batch` in pieces at all.

    Raises:
        NotApplicable: it does not; the message says why.
    """
    parameters = inspect.signature(model.forward).parameters
    if "past_key_values" not in parameters:
        raise NotApplicable(f"{type(model).__name__} takes no past_key_values")
    try:
        columns = decode(engine, model, None, batch, ends).shape[1]
    except Exception as error:  # whatever a family ends in
        raise NotApplicable(f"the unfrozen model does not go on from a cache: {error}") from error
    if columns != batch.input_ids.shape[1]:
        raise NotApplicable("the unfrozen model wants cached tokens again, and is not handed them piece by piece")
