"""A config or a batch that is stated in the place of drawn ones, for claims that draw their own."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from hypothesis import strategies as st

if TYPE_CHECKING:
    from freeze_core import InterventionConfig
    from pytest_circuitfreeze.strategies import Batch

T = TypeVar("T")

STATED: ContextVar[InterventionConfig | Batch | None] = ContextVar("circuitfreeze_stated", default=None)
"""What `strategies.configs` or `batches` are to give; narrower strategies that rule it out end the example."""


def demand(draw: st.DrawFn, allowed: st.SearchStrategy[T], value: object) -> None:
    """Ends the example, as one that does not count, unless `allowed` may give `value`."""
    # A comparison that Hypothesis understands: it narrows ranges and lists to the one value, and does not search.
    draw(allowed.filter(partial(operator.eq, value)))


class StatedData:
    """Stands for Hypothesis's `data` and gives what is stated where a test draws it under its label.

    Args:
        data: draws everything else.
        stated: by the label of the draw.
    """

    def __init__(self, data: st.DataObject, stated: Mapping[str, InterventionConfig | Batch]) -> None:
        self._data = data
        self._stated = stated
        self.used: set[str] = set()

    def draw(self, strategy: st.SearchStrategy[T], label: str | None = None) -> T:
        """Draws from `strategy`, as `data.draw` does."""
        # Several configs at once are drawn under the plural.
        name = (label or "").removesuffix("s")
        held = STATED.set(self._stated.get(name))
        self.used.add(name)
        try:
            return self._data.draw(strategy, label=label)
        finally:
            STATED.reset(held)
