"""What an engine does not do: what it refuses by name, before anything is installed, and what it does not offer at all.

A refusal is an `UnsupportedModelError` when a model is to be frozen, of some configs or, if the engine's `refuses`
says so, of all; it is judged: it has a reason and leaves no trace. What is not offered is what `supports` gives a
reason for, or `not_offered` for a whole claim: the engine is not asked for it, and it is no pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from pytest_circuitfreeze.engines import Engine
from pytest_circuitfreeze.origins import stands_for
from pytest_circuitfreeze.results import CircuitRecord
from pytest_circuitfreeze.suites.claims import Claim, Margin, check
from pytest_circuitfreeze.suites.judge.visible_state import changes, visible_state

if TYPE_CHECKING:
    from freeze_core import InterventionConfig

__all__ = ["NotOffered", "Refused", "Refusing", "check_refusal", "claim_not_offered", "not_offered", "note", "refusal"]

_REFUSALS: WeakKeyDictionary[nn.Module, dict[int, tuple[Engine, str | None]]] = WeakKeyDictionary()
# By identity: an engine may well compare by value, and then has no hash.


class Refused(Exception):
    """The engine refuses to freeze a model in one way; the message is its reason."""


class NotOffered(Refused):
    """The engine does not claim to freeze a model in this way, so it was not asked to; the message is its reason."""


class Refusing:
    """An engine that tells a refusal from an error: what it wraps refuses by name, or its error comes through."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.name = engine.name
        stands_for(self, engine)
        if hasattr(engine, "unfrozen"):
            self.unfrozen = engine.unfrozen

    @contextmanager
    def freeze(
        self, model: PreTrainedModel, config: InterventionConfig | Sequence[InterventionConfig]
    ) -> Iterator[Callable[..., Any]]:
        """Freezes as the engine does.

        Raises:
            NotOffered: the engine does not claim to.
            Refused: the engine refuses.
            ClaimBroken: it refuses, and has already done something to the model.
        """
        from freeze_core import UnsupportedModelError

        reason = not_offered(self.engine, model, config)
        if reason is not None:
            raise NotOffered(reason)
        with ExitStack() as stack:
            try:
                frozen = stack.enter_context(self.engine.freeze(model, config))
            except UnsupportedModelError as error:
                check_refusal(self.engine, model, config)
                raise Refused(str(error)) from error
            yield frozen


def note(record: CircuitRecord, refused: Refused) -> None:
    """Writes down what an engine does not do, and why."""
    (record.not_offered_config if isinstance(refused, NotOffered) else record.refused_config)(str(refused))


def not_offered(engine: Engine, model: PreTrainedModel, config: Any) -> str | None:
    """Why `engine` does not claim to freeze `model` as `config`, one or several, says, if `supports` has a reason."""
    supports = getattr(engine, "supports", None)
    reason: str | None = None if supports is None else supports(model, config)
    return reason


def claim_not_offered(engine: Engine, claim: str) -> str | None:
    """Why `engine` does not make a claim, whatever the config, if it has a reason in `not_offered`."""
    reasons: Mapping[str, str] = getattr(engine, "not_offered", {})
    return reasons.get(claim)


def refusal(engine: Engine, model: PreTrainedModel) -> str | None:
    """Why `engine` refuses `model` whatever the config, if it says so; asked once for each pair."""
    known = _REFUSALS.setdefault(model, {})
    if id(engine) not in known:
        refuses = getattr(engine, "refuses", None)
        known[id(engine)] = engine, None if refuses is None else refuses(model)
    return known[id(engine)][1]


@check
def check_refusal(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig | Sequence[InterventionConfig] | None = None
) -> Margin:
    """A freeze that `engine` says it cannot serve is refused, with a reason and without a trace.

    Args:
        config: what is refused; by default the model is, whatever is asked of it.

    Raises:
        ClaimBroken: it is not.
    """
    from freeze_core import InterventionConfig

    claim = Claim("a refusal names its reason and installs nothing")
    before = visible_state(model)
    try:
        with engine.freeze(model, InterventionConfig() if config is None else config):
            pass
    except Exception as error:  # whatever an engine refuses with
        claim.demand(len(str(error).split()) > 2, f"the reason given is {str(error)!r}")
    else:
        claim.broken("it was not refused")
    found = changes(before, visible_state(model))
    claim.demand(not found, f"{len(found)} traces, such as: {'; '.join(found[:3])}")
    return claim.margin
