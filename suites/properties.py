"""How the shipped properties run: with the plugin's own Hypothesis profile, whatever a project has loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import given, settings
from hypothesis import strategies as st

__all__ = ["proven"]

Test = TypeVar("Test", bound=Callable[..., None])


def proven(test: Test) -> Callable[..., None]:
    """Runs `test` on examples that it draws itself from its argument `data`, as many as the chosen profile says."""
    drawn: Any = given(data=st.data())(test)
    decorated: Callable[..., None] = settings(settings.get_profile("circuitfreeze"))(drawn)
    return decorated
