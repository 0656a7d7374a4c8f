"""The JSON document of a run: what was run, under what, and one entry a test."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pytest_circuitfreeze.results import Result
from pytest_circuitfreeze.settings import Settings

SCHEMA = 1
LISTS = ("refusals", "not_offered")
"""The fields of a result that hold several texts."""


class ReportError(Exception):
    """A file that is no report, or one of another schema."""


@dataclass(frozen=True)
class Report:
    """What ``report.json`` holds, for those who render it."""

    settings: Mapping[str, Any]
    environment: Mapping[str, str]
    results: tuple[Result, ...]

    @property
    def targets(self) -> tuple[str, ...]:
        """The models in the order asked for."""
        return (*self.settings["architectures"], *self.settings["models"])


def build(settings: Settings, versions: Mapping[str, str], results: Iterable[Result], status: int) -> dict[str, Any]:
    """The document as plain data. ``seconds`` are wall time, ``error`` and ``bound`` absolute differences.

    Args:
        settings: what the run was asked to do.
        versions: of the software that a result depends on, by name.
        results: one a test.
        status: pytest's exit status; a run that was stopped (2) lacks results.
    """
    chosen = asdict(settings)
    # Where a report lies is no part of what was run, and may name a user's folder.
    del chosen["report"], chosen["enabled"]
    # What a factory is cannot be told in words; its name is among the models.
    del chosen["factories"]
    chosen["accepted"] = [str(entry) for entry in settings.accepted]
    return {
        "schema": SCHEMA,
        "exit_status": status,
        "environment": {**versions, "python": platform.python_version(), "platform": platform.platform()},
        "settings": {**chosen, "architectures": list(chosen["architectures"]), "models": list(chosen["models"])},
        "results": [asdict(result) | {name: list(getattr(result, name)) for name in LISTS} for result in results],
    }


def read(path: Path) -> Report:
    """The report that ``path`` holds.

    Raises:
        ReportError: the file is no report of schema :data:`SCHEMA`.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        schema = document["schema"]
        if schema != SCHEMA:
            raise ReportError(f"{path} has schema {schema!r}; this version reads {SCHEMA}")
        # JSON has lists alone.
        results = tuple(
            Result(**{**entry, **{name: tuple(entry.get(name, ())) for name in LISTS}}) for entry in document["results"]
        )
        return Report(document["settings"], document["environment"], results)
    except (ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{path} is no circuitfreeze report: {type(error).__name__}: {error}") from error
