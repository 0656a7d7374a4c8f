"""What a freeze cannot serve is an error that says so: never a quiet wrong, never a stray one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.claims import Claim, Margin, NotApplicable, check
from pytest_circuitfreeze.suites.judge.decoding import cache_argument, cache_returned, refuse_lost_cache
from pytest_circuitfreeze.suites.judge.judged_sites import CannotJudge
from pytest_circuitfreeze.suites.judge.observed_passes import attention_implementation
from pytest_circuitfreeze.suites.judge.site_lookup import implementations
from pytest_circuitfreeze.suites.judge.visible_state import changes, moving, visible_state
from pytest_circuitfreeze.suites.refusals import Refused

if TYPE_CHECKING:
    from freeze_core import InterventionConfig
    from pytest_circuitfreeze.engines import Engine

__all__ = ["check_what_cannot_be_served_is_an_error"]


@check
def check_what_cannot_be_served_is_an_error(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch, cached: int = 0
) -> Margin:
    """A freeze that cannot serve a pass says so, by an `InterventionError` and without a trace.

    Args:
        config: one that cannot serve `batch`.
        cached: so many columns are served, into a cache; the pass that cannot be served goes on from there.

    Raises:
        ClaimBroken: it was served, another error was raised, or something of the freeze is left.
        NotApplicable, CannotJudge: the unfrozen model cannot make such a pass, as `refuse_lost_cache` has it.
    """
    from freeze_core import InterventionError

    claim = Claim("what cannot be served is an error")
    with attention_implementation(model, implementations(model)[0]), torch.no_grad():
        try:
            own = moving(model, lambda: model(**_after(model, model, batch, cached)))
        except (NotApplicable, CannotJudge):
            raise
        except Exception as error:  # whatever a model does
            raise refuse_lost_cache(model, f"raised {type(error).__name__}: {error}") from error
        before = visible_state(model)
        try:
            with engine.freeze(model, config) as frozen:
                _demand_error(claim, frozen, _after(frozen, model, batch, cached))
        except InterventionError as error:  # already when installed
            claim.demand(cached == 0, f"what can be served was refused, too: {error}")
            _demand_reason(claim, error)
        found = changes(*(_without(state, own) for state in (before, visible_state(model))))
    claim.demand(not found, f"{len(found)} traces, such as: {'; '.join(found[:3])}")
    return claim.margin


def _without(state: dict[str, object], own: set[str]) -> dict[str, object]:
    """A model's state but for what its own passes move."""
    return {name: value for name, value in state.items() if name not in own}


def _demand_error(claim: Claim, frozen: Callable[..., Any], arguments: dict[str, Any]) -> None:
    from freeze_core import InterventionError

    try:
        frozen(**arguments)
    except Refused:
        raise
    except InterventionError as error:
        _demand_reason(claim, error)
        return
    except Exception as error:  # whatever an engine fails with
        claim.broken(f"it failed with {type(error).__name__}: {error}")
    claim.broken("it was served")


def _demand_reason(claim: Claim, error: Exception) -> None:
    claim.demand(len(str(error).split()) > 2, f"the reason given is {str(error)!r}")


def _after(call: Callable[..., Any], model: PreTrainedModel, batch: Batch, cached: int) -> dict[str, Any]:
    """Arguments for the columns after the first `cached` ones, which `call` is run on."""
    whole = batch.arguments(model)
    if cached == 0:
        return whole
    first = {name: value[:, :cached] if isinstance(value, torch.Tensor) else value for name, value in whole.items()}
    cache = cache_returned(model, call(**{**first, "use_cache": True}))
    rest = {name: value[:, cached:] if isinstance(value, torch.Tensor) else value for name, value in whole.items()}
    mask = {name: value for name, value in whole.items() if name == "attention_mask"}
    return {**rest, **mask, **cache_argument(model, cache), "use_cache": True}
