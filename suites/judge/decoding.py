"""Runs a batch piece by piece, each piece on the cache that those before it have filled."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import Cache, LlamaForCausalLM, PreTrainedModel

from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.claims import NotApplicable
from pytest_circuitfreeze.suites.judge.judged_sites import CannotJudge
from pytest_circuitfreeze.suites.judge.observed_passes import attention_implementation
from pytest_circuitfreeze.suites.judge.site_lookup import implementations
from pytest_circuitfreeze.wrapped import config_of

if TYPE_CHECKING:
    from freeze_core import InterventionConfig
    from pytest_circuitfreeze.engines import Engine

__all__ = ["cache_argument", "cache_returned", "decode", "demand_decoding", "go_on", "refuse_lost_cache"]

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""What transformers' models call the argument that takes a cache: from 5.24 on the first, before that the others."""

WITHOUT_CACHE = {
    "cpmant": "it is given all tokens again at each step, behind a prompt that it puts before them",
    "flaubert": "it returns no cache, and is given its cached tokens again at each step",
    "openai-gpt": "it has no cache",
    "recurrent_gemma": "it returns no cache, and keeps its states in its modules",
    "xlm": "it returns no cache, and is given its cached tokens again at each step",
}
"""The types of transformers' models that do not go on from a cache, and why.

Every other type must: where it does not, something has changed that the judge must be told, or the claims about caches
would drop out unseen.
"""


def cache_returned(model: PreTrainedModel, output: Any) -> Cache:
    """The cache among what `model` returned, whatever it is called there.

    Raises:
        NotApplicable, CannotJudge: there is none, as `refuse_lost_cache` has it.
    """
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    cache = next((value for value in values if isinstance(value, Cache)), None)
    if cache is None:
        raise refuse_lost_cache(model, f"returned no cache, but a {type(output).__name__}")
    return cache


def cache_argument(model: PreTrainedModel, cache: Any) -> dict[str, Any]:
    """`cache` as the keyword argument by which `model` takes it.

    Raises:
        NotApplicable, CannotJudge: it takes none by a name that is known here, as `refuse_lost_cache` has it.
    """
    parameters = inspect.signature(model.forward).parameters
    # Something around a model of transformers may pass on all that it is given.
    passes_on = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    known = [*parameters, *(inspect.signature(LlamaForCausalLM.forward).parameters if passes_on else ())]
    name = next((name for name in CACHE_NAMES if name in known), None)
    if name is None:
        raise refuse_lost_cache(model, f"takes none of {', '.join(CACHE_NAMES)}, but {', '.join(parameters)}")
    return {name: cache}


def refuse_lost_cache(model: PreTrainedModel, found: str) -> NotApplicable | CannotJudge:
    """What to raise where `model` does not go on from a cache, with what was `found` of it.

    `NotApplicable` where its type is known for that, or where it is no model of transformers and its config promises no
    cache. An error elsewhere: a claim must not drop out because a library calls something by another name.
    """
    from freeze_core.errors import with_newer_versions

    name, kind = type(model).__name__, config_of(model).model_type
    if kind in WITHOUT_CACHE:
        return NotApplicable(f"{name} does not go on from a cache: {WITHOUT_CACHE[kind]}")
    shipped = type(model).__module__.startswith("transformers.")
    if not shipped and not getattr(config_of(model), "use_cache", False):
        return NotApplicable(f"{name} does not go on from a cache: its config does not say use_cache")
    return CannotJudge(with_newer_versions(f"{name} (model type {kind!r}) must go on from a cache, and {found}"))


def go_on(
    call: Callable[..., Any], model: PreTrainedModel, batch: Batch, start: int, stop: int, cache: Any = None
) -> tuple[Tensor, Any]:
    """Runs the columns `start` to `stop` of `batch` on `cache`, which holds those before, or on a new one.

    Args:
        call: the model or what an engine yields for it.

    Returns:
        logits `[batch, stop - start, vocabulary]`, and the cache, which now holds these columns, too.

    Raises:
        NotApplicable, CannotJudge: the model gives no cache, or takes none.
    """
    given = batch.arguments(model)
    own: dict[str, Any] = {name: given[name][:, start:stop] for name in ("input_ids", "position_ids") if name in given}
    if "attention_mask" in given:
        own["attention_mask"] = given["attention_mask"][:, :stop]
    if cache is not None:
        own |= cache_argument(model, cache)
    output = call(**own, use_cache=True)
    cache = cache_returned(model, output)
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
        NotApplicable, CannotJudge: it does not, as `refuse_lost_cache` has it.
    """
    try:
        columns = decode(engine, model, None, batch, ends).shape[1]
    except (NotApplicable, CannotJudge):
        raise
    except Exception as error:  # whatever a family ends in
        raise refuse_lost_cache(model, f"raised {type(error).__name__}: {error}") from error
    if columns != batch.input_ids.shape[1]:
        raise refuse_lost_cache(model, f"gave logits of {columns} columns for {batch.input_ids.shape[1]} tokens")
    if len(ends) > 1 and model not in _READS_CACHE:
        if _ignores_cache(model, batch, ends[-2], ends[-1]):
            raise refuse_lost_cache(model, "gave the same logits for a step with the cache as without it")
        _READS_CACHE.add(model)


_READS_CACHE: WeakSet[PreTrainedModel] = WeakSet()
"""The models whose steps were seen to depend on the cache."""


def _ignores_cache(model: PreTrainedModel, batch: Batch, start: int, stop: int) -> bool:
    """Whether the columns `start` to `stop` of `batch` come out the same, bit for bit, with the cache and without.

    A forward that takes any keyword argument takes a cache under a name that it no longer reads. The unfrozen model
    then fails to equal itself, and the claim would be found not to apply.
    """
    with attention_implementation(model, implementations(model)[0]), torch.no_grad():
        _, cache = go_on(model, model, batch, 0, start)
        step, _ = go_on(model, model, batch, start, stop, cache)
        try:
            alone, _ = go_on(model, model, batch, start, stop)
        except Exception:  # a mask that is longer than the tokens, say
            return False
    return torch.equal(step, alone)
