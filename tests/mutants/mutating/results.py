"""What became of each mutant: a file with a line for each, which a run reads first and adds to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

KILLED = ("killed", "timeout")


class Result(NamedTuple):
    """`outcome` is killed (then `by` names the test, or the error that ended pytest), timeout, survived, unreached
    (no test runs the line) or invalid (no Python). `tests` of the `reached` ones were run at most. `first` is the
    outcome when it was first tried, before tests were written for it."""

    name: str
    outcome: str
    by: str
    tests: int
    reached: int
    first: str

    @property
    def is_killed(self) -> bool:
        """Whether the tests noticed the mutant."""
        return self.outcome in KILLED


def read(path: Path) -> dict[str, Result]:
    """By the mutants' names; the last one counts where a mutant was tried again."""
    results: dict[str, Result] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        result = Result(**json.loads(line))
        results[result.name] = result._replace(first=results.get(result.name, result).first)
    return results


def add(path: Path, result: Result) -> None:
    """Adds a line at the end."""
    with path.open("a") as file:
        file.write(f"{json.dumps(result._asdict())}\n")


def keep(path: Path, results: Mapping[str, Result], names: Iterable[str]) -> None:
    """Writes the file anew: one line for each of these mutants that has a result."""
    path.unlink(missing_ok=True)
    for name in names:
        if name in results:
            add(path, results[name])
