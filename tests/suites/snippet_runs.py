"""Runs what a broken claim shows, and compares how it ends."""

from __future__ import annotations

import pytest

from pytest_circuitfreeze.suites.claims import ClaimBroken

WIDTH = 79
"""Longest line of a snippet."""


def snippet_of(broken: ClaimBroken) -> str:
    assert broken.call is not None
    return broken.call.snippet


def run(snippet: str, **names: object) -> ClaimBroken:
    """What a snippet ends in, in a namespace of its own."""
    with pytest.raises(ClaimBroken) as caught:
        exec(compile(snippet, "snippet.py", "exec"), dict(names))
    return caught.value


def demand_the_same(found: ClaimBroken, known: ClaimBroken) -> None:
    assert (found.sentence, found.found, found.place, found.margin) == (
        known.sentence,
        known.found,
        known.place,
        known.margin,
    )
    assert str(found) == str(known)
    assert snippet_of(found) == snippet_of(known)
