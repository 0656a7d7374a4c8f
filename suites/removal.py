"""Removal: afterwards the model is what it was, however the freeze ended and however freezes were nested."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.claims import Claim, Margin, check
from pytest_circuitfreeze.suites.independence import first_frozen
from pytest_circuitfreeze.suites.judge.observed_passes import logits_of, run_pass
from pytest_circuitfreeze.suites.judge.visible_state import added, changes, moving, visible_state, wrap_forward

if TYPE_CHECKING:
    from freeze_core import InterventionConfig
    from pytest_circuitfreeze.engines import Engine

__all__ = [
    "check_error_in_body_leaves_no_trace",
    "check_error_in_forward_leaves_no_trace",
    "check_freezes_can_be_repeated",
    "check_nesting_is_a_list",
    "check_removal_leaves_no_trace",
]


class _Failure(Exception):
    """Raised on purpose."""


class _Interruption(KeyboardInterrupt):
    """Raised on purpose, as by a user who is tired of waiting: no `Exception`."""


@check
def check_removal_leaves_no_trace(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch
) -> Margin:
    """After a freeze, outputs are the unfrozen model's bit for bit and nothing of it is left on the model.

    So it is too where forwards of the model were wrapped meanwhile, or the engine refuses to end until that is undone.

    Raises:
        ClaimBroken: an output, hook, attribute, parameter, buffer or class is not what it was.
    """
    claim = Claim("removal leaves no trace")
    clean, before = _unfrozen(engine, model, batch)
    run_pass(engine, model, config, batch)
    _demand_no_trace(claim, model, before)
    _end_beneath_wrappers(engine, model, config)
    _demand_no_trace(claim, model, before)
    claim.same("logits", run_pass(engine, model, None, batch).logits, clean, "row position word")
    return claim.margin


@check
def check_error_in_body_leaves_no_trace(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch, interrupted: bool = False
) -> Margin:
    """When the block under a freeze raises, the error comes through and the model is what it was.

    Args:
        interrupted: whether it is a `KeyboardInterrupt` that is raised, rather than an `Exception`.

    Raises:
        ClaimBroken: it is not, or the error was swallowed.
    """
    claim = Claim("an error under a freeze leaves no trace")
    clean, before = _unfrozen(engine, model, batch)
    error = _Interruption if interrupted else _Failure
    try:
        with engine.freeze(model, config):
            raise error
    except error:
        pass
    else:
        claim.broken("the error was swallowed")
    _demand_no_trace(claim, model, before)
    claim.same("logits", run_pass(engine, model, None, batch).logits, clean, "row position word")
    return claim.margin


@check
def check_error_in_forward_leaves_no_trace(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch, interrupted: bool = False
) -> Margin:
    """When a frozen forward raises inside a frozen layer, the next one is right, and so is the model afterwards.

    Args:
        interrupted: whether it is a `KeyboardInterrupt` that is raised, rather than an `Exception`.

    Raises:
        ClaimBroken: the failed pass is felt later, or its error was swallowed.
    """
    claim = Claim("an error in a frozen forward leaves no trace")
    clean, before = _unfrozen(engine, model, batch)
    want = run_pass(engine, model, config, batch).logits
    site = first_frozen(model, config)
    error = _Interruption if interrupted else _Failure

    def fail(*_: object) -> None:
        raise error

    with engine.freeze(model, config) as frozen:
        if hasattr(frozen, "stand_in"):
            site = site.moved_to(frozen.stand_in)
        handle = site.output.register_forward_pre_hook(fail)
        try:
            frozen(**batch.arguments(model))
        except error:
            pass
        else:
            claim.broken("the error was swallowed")
        finally:
            handle.remove()
        got = logits_of(frozen, model, batch)
    claim.same("logits of the next frozen pass", got, want, "row position word")
    _demand_no_trace(claim, model, before)
    claim.same("logits afterwards", run_pass(engine, model, None, batch).logits, clean, "row position word")
    return claim.margin


@check
def check_freezes_can_be_repeated(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch, other: Batch
) -> Margin:
    """The same freeze gives the same logits again, bit for bit: on later passes, after another batch, anew.

    The tokens of `other` are run with its mask, and then without one, which is to leave no trace of the mask.

    Raises:
        ClaimBroken: it does not.
    """
    claim = Claim("a freeze can be repeated")
    unmasked = Batch.of_tokens(other.input_ids)
    want, of_unmasked = (run_pass(engine, model, config, each).logits for each in (batch, unmasked))
    with engine.freeze(model, config) as frozen:
        logits_of(frozen, model, other)
        got = logits_of(frozen, model, unmasked)
        claim.same("logits without a mask after a pass with one", got, of_unmasked, "row position word")
        claim.same("logits on a third pass", logits_of(frozen, model, batch), want, "row position word")
    claim.same("logits when installed anew", run_pass(engine, model, config, batch).logits, want, "row position word")
    return claim.margin


@check
def check_nesting_is_a_list(
    engine: Engine,
    model: PreTrainedModel,
    configs: Sequence[InterventionConfig],
    batch: Batch,
    ends: Sequence[int],
) -> Margin:
    """Nested freezes equal one list in the same order, and leave in any order: what is still on stays in force.

    Args:
        ends: the places of the configs in the order in which their freezes end.

    Raises:
        ClaimBroken: they do not, bit for bit.
    """
    claim = Claim("nested freezes are one list in order")
    clean, before = _unfrozen(engine, model, batch)
    staying = [[place for place in range(len(configs)) if place not in ends[:ended]] for ended in range(len(ends))]
    want = [run_pass(engine, model, [configs[place] for place in places], batch).logits for places in staying]
    entered: dict[int, tuple[AbstractContextManager[Any], Callable[..., Any]]] = {}
    try:
        for place, config in enumerate(configs):
            context = engine.freeze(model, config)
            entered[place] = (context, context.__enter__())
        for places, due, ending in zip(staying, want, ends, strict=True):
            _, frozen = entered[places[-1]]
            got = logits_of(frozen, model, batch)
            claim.same(f"logits under freezes {', '.join(map(str, places))}", got, due, "row position word")
            entered.pop(ending)[0].__exit__(None, None, None)
    finally:
        for context, _ in reversed(entered.values()):
            context.__exit__(None, None, None)
    _demand_no_trace(claim, model, before)
    claim.same("logits afterwards", run_pass(engine, model, None, batch).logits, clean, "row position word")
    return claim.margin


def _end_beneath_wrappers(engine: Engine, model: PreTrainedModel, config: InterventionConfig) -> None:
    """Freezes the model, ends that while the forward of each module is wrapped, and takes the wrappers off.

    An engine that refuses to end with something on top of its own gives what is to be removed afterwards as the
    attribute `frozen` of its error, or can be ended again.
    """
    context = engine.freeze(model, config)
    context.__enter__()
    undo = [wrap_forward(module) for module in model.modules()]
    end_again: Callable[[], object] | None = None
    try:
        context.__exit__(None, None, None)
    except Exception as refusal:
        frozen = getattr(refusal, "frozen", None)
        end_again = partial(context.__exit__, None, None, None) if frozen is None else frozen.remove
    for take_off in undo:
        take_off()
    if end_again is not None:
        end_again()


class _State(NamedTuple):
    """A model's visible state, and what its own passes move of it."""

    visible: dict[str, object]
    moving: set[str]


def _unfrozen(engine: Engine, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, _State]:
    """The unfrozen model's logits and state."""
    moved = moving(model, lambda: run_pass(engine, model, None, batch))
    return run_pass(engine, model, None, batch).logits, _State(visible_state(model), moved)


def _demand_no_trace(claim: Claim, model: PreTrainedModel, before: _State) -> None:
    own = (before.visible, visible_state(model))
    found = changes(*({name: one for name, one in state.items() if name not in before.moving} for state in own))
    # What is left by the first freeze of all is there before any later one.
    found += [f"{name} is there since an earlier freeze" for name in added(model) if name in before.visible]
    claim.demand(not found, f"{len(found)} traces, such as: {'; '.join(found[:3])}")
