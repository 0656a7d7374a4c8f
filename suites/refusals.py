"""What an engine refuses, it refuses by name: with a reason, and before anything is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from pytest_circuitfreeze.engines import Engine
from pytest_circuitfreeze.origins import stands_for
from pytest_circuitfreeze.suites.claims import Claim, Margin, check
from pytest_circuitfreeze.suites.judge.state import changes, visible_state

if TYPE_CHECKING:
    from freeze_core import InterventionConfig

__all__ = ["Refused", "Refusing", "check_refusal", "refusal"]

_REFUSALS: WeakKeyDictionary[Engine, WeakKeyDictionary[nn.Module, str | None]] = WeakKeyDictionary()


class Refused(Exception):
    """The engine refuses to freeze a model in one way; the message is its reason."""


class Refusing:
    """An engine that tells a refusal from an error: what it wraps refuses by name, or its error comes through."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.name = engine.name
        stands_for(self, engine)

    @contextmanager
    def freeze(
        self, model: PreTrainedModel, config: InterventionConfig | Sequence[InterventionConfig]
    ) -> Iterator[Callable[..., Any]]:
        """Freezes as the engine does.

        Raises:
            Refused: the engine refuses.
            ClaimBroken: it refuses, and has already done something to the model.
        """
        with ExitStack() as stack:
            try:
                frozen = stack.enter_context(self.engine.freeze(model, config))
            except Exception as error:
                reason = _reason(self.engine, model, config, error)
                if reason is None:
                    raise
                check_refusal(self.engine, model, config)
                raise Refused(reason) from error
            yield frozen


def refusal(engine: Engine, model: PreTrainedModel) -> str | None:
    """Why `engine` cannot serve `model` at all, if it says so; asked once for each pair."""
    known = _REFUSALS.setdefault(engine, WeakKeyDictionary())
    if model not in known:
        from freeze_core import InterventionConfig

        supports = getattr(engine, "supports", None)
        known[model] = None if supports is None else supports(model, InterventionConfig())
    return known[model]


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


def _reason(engine: Engine, model: PreTrainedModel, config: Any, error: Exception) -> str | None:
    from freeze_core import UnsupportedModelError

    if isinstance(error, UnsupportedModelError):
        return str(error)
    supports = getattr(engine, "supports", None)
    found: str | None = supports(model, config) if supports else None
    return found
