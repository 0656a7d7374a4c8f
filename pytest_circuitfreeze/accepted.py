"""Failures that are known and accepted, each with its reason: no failure of the run, unless the entry is stale."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from pytest_circuitfreeze.results import PREFIX, WITHOUT_MODEL, claim_of, model_of


@dataclass(frozen=True)
class Accepted:
    """One entry of the list: a claim that is known to fail on a model, and why that is accepted."""

    claim: str
    model: str
    reason: str = field(compare=False)

    def __str__(self) -> str:
        return f"{self.claim} {self.model}: {self.reason}"


def parse_accepted(text: str) -> Accepted:
    """An entry of the form ``claim model: reason``.

    Raises:
        ValueError: it has another form, or no reason.
    """
    # A model's own name may hold a colon (module:factory), but no space.
    found = re.fullmatch(r"\s*(\w[\w ]*?)\s+(\S+):(?:\s+(.*))?", text)
    if found is None:
        raise ValueError(f"{text!r} accepts no failure; give 'claim model: reason', named as in the table")
    claim, model, reason = found.groups()
    if not (reason or "").strip():
        raise ValueError(f"{text!r} gives no reason; give 'claim model: reason'")
    return Accepted("_".join(claim.split()), model, reason.strip())


class AcceptedFailures:
    """The list, as a run is held to it."""

    def __init__(self, entries: Iterable[Accepted]) -> None:
        self._entries = {(entry.claim, entry.model): entry for entry in entries}

    def judge(self, item: pytest.Function, report: pytest.TestReport) -> None:
        """Turns, in the report of a call, a failure that is listed into an accepted one, and its absence into one."""
        entry = self._entries.get(_key(item))
        if entry is None:
            return
        if report.failed:
            report.outcome = "skipped"
            report.wasxfail = f"accepted: {entry.reason}"
            item.user_properties.append((PREFIX + "accepted", entry.reason))
        else:
            report.outcome = "failed"
            report.longrepr = f"accepted as a failure, and does not fail; remove the entry: {entry}"

    def unmatched(self, items: Iterable[pytest.Function], models: Sequence[str]) -> list[Accepted]:
        """The entries about `models` that are about none of `items`, all claims of the run."""
        known = {_key(item) for item in items}
        about = {*models, WITHOUT_MODEL}
        return [entry for key, entry in self._entries.items() if key not in known and entry.model in about]

    def elsewhere(self, models: Sequence[str]) -> list[Accepted]:
        """The entries about other models than `models`: this run cannot tell whether they are stale."""
        return [entry for entry in self._entries.values() if entry.model not in {*models, WITHOUT_MODEL}]


class StaleEntry(pytest.Item):
    """Stands for an entry that is about no test, and fails: in workers, ids and reports it is like any other test."""

    def __init__(self, *, entry: Accepted, engine: str, **node: Any) -> None:
        super().__init__(**node)
        self._entry = entry
        facts = {
            "claim": entry.claim,
            "sentence": "An accepted failure is one of a test.",
            "model": entry.model,
            "engine": engine,
        }
        self.user_properties += [(PREFIX + key, value) for key, value in facts.items()]

    def runtest(self) -> None:
        """Fails."""
        pytest.fail(f"accepted as a failure, and no claim is called so; remove the entry: {self._entry}", pytrace=False)

    def reportinfo(self) -> tuple[str, None, str]:
        """Where the entry is said to be: in the list."""
        return "accepted", None, self.name


def _key(item: pytest.Function) -> tuple[str, str]:
    return claim_of(item), model_of(item) or WITHOUT_MODEL
