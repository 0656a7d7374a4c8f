"""A config or a batch that is stated in the place of drawn ones, for claims that draw their own."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from contextvars import ContextVar
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar

from hypothesis import HealthCheck, Phase, find, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample, Unsatisfiable

if TYPE_CHECKING:
    from freeze_core import InterventionConfig
    from pytest_circuitfreeze.strategies import Batch

T = TypeVar("T")

STATED: ContextVar[InterventionConfig | Batch | None] = ContextVar("circuitfreeze_stated", default=None)
"""What `strategies.configs` or `batches` are to give, if their narrower strategies may."""


_LOOK = settings(
    database=None, max_examples=50, phases=[Phase.generate], suppress_health_check=list(HealthCheck), deadline=None
)


def demand(allowed: st.SearchStrategy[T], name: str, value: object) -> None:
    """Demands that `allowed` may give `value`, which is stated for what is called `name`.

    Raises:
        NotApplicable: it may not, so the claim that draws from it says nothing about what is stated.
    """
    from pytest_circuitfreeze.suites.claims import NotApplicable

    # A comparison that Hypothesis understands: it narrows ranges and lists to the one value. Drawn aside, since a draw
    # of the example's own would count as a choice, and the one example be run again for each.
    narrowed = allowed.filter(partial(operator.eq, value))
    try:
        find(narrowed, lambda _: True, settings=_LOOK, random=Random(0))
    except (NoSuchExample, Unsatisfiable):
        raise NotApplicable(f"it is not about {name}={value}") from None


class StatedData:
    """Stands for Hypothesis's `data` and gives what is stated where a test draws it under its label.

    Args:
        data: draws everything else.
        stated: by the label of the draw; a strategy is drawn from.
    """

    def __init__(self, data: st.DataObject, stated: Mapping[str, Any]) -> None:
        self._data = data
        self._stated = stated
        self.used: set[str] = set()

    def draw(self, strategy: st.SearchStrategy[T], label: str | None = None) -> T:
        """Draws from `strategy`, as `data.draw` does."""
        # Several configs at once are drawn under the plural.
        name = (label or "").removesuffix("s")
        value = self._stated.get(name)
        held = STATED.set(self._data.draw(value) if isinstance(value, st.SearchStrategy) else value)
        self.used.add(name)
        try:
            return self._data.draw(strategy, label=label)
        finally:
            STATED.reset(held)
