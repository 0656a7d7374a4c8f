"""The JSON document of a run: what was run, under what, and one entry a test.

Schema 2, all of it plain data:

| key | holds |
| --- | --- |
| `schema` | 2 |
| `exit_status` | pytest's; 2 is a run that was interrupted |
| `complete` | whether every test that was chosen has run |
| `started` | UTC, ISO 8601 |
| `seconds` | wall time of the run |
| `environment` | versions by name, Python, platform, CPU, cores |
| `settings` | the options, by name |
| `results` | one object a test: the fields of `pytest_circuitfreeze.results.Result` |
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from pytest_circuitfreeze.benchmarks import Benchmark
from pytest_circuitfreeze.results import Result
from pytest_circuitfreeze.settings import Settings

SCHEMA = 2
LISTS = ("refusals", "not_offered")
"""The fields of a result that hold several texts."""
MARGINS = ("error", "bound")


class ReportError(Exception):
    """A file that is no report, or one of another schema."""


class Ended(NamedTuple):
    """How a run ended."""

    status: int
    """pytest's exit status."""
    complete: bool
    """Whether every test that was chosen has run."""
    started: datetime
    seconds: float


@dataclass(frozen=True)
class Report:
    """What ``report.json`` holds, for those who render it."""

    settings: Mapping[str, Any]
    environment: Mapping[str, str]
    ended: Ended
    everything: tuple[Result, ...]
    """All results, those of benchmarks included."""

    @property
    def results(self) -> tuple[Result, ...]:
        """One a test of a claim."""
        return tuple(result for result in self.everything if not result.is_benchmark)

    @property
    def benchmarks(self) -> tuple[Benchmark, ...]:
        """What was measured, if anything."""
        return tuple(result.benchmark for result in self.everything if result.benchmark)

    @property
    def failed(self) -> tuple[Result, ...]:
        """The tests that failed, or could not be run, of claims and benchmarks."""
        return tuple(result for result in self.everything if result.outcome in ("failed", "error"))

    @property
    def targets(self) -> tuple[str, ...]:
        """The models in the order asked for."""
        return (*self.settings["architectures"], *self.settings["models"])


def build(settings: Settings, versions: Mapping[str, str], results: Iterable[Result], ended: Ended) -> dict[str, Any]:
    """The document as plain data. ``seconds`` are wall time, ``error`` and ``bound`` absolute differences.

    Args:
        settings: what the run was asked to do.
        versions: of the software that a result depends on, by name.
        results: one a test.
        ended: how the run ended.
    """
    chosen = asdict(settings)
    # Where a report lies is no part of what was run, and may name a user's folder.
    del chosen["report"], chosen["enabled"]
    # What a factory is cannot be told in words; its name is among the models.
    del chosen["factories"]
    chosen["accepted"] = [str(entry) for entry in settings.accepted]
    return {
        "schema": SCHEMA,
        "exit_status": ended.status,
        "complete": ended.complete,
        "started": ended.started.astimezone(UTC).isoformat(timespec="seconds"),
        "seconds": round(ended.seconds, 1),
        "environment": {**versions, **machine()},
        "settings": {**chosen, "architectures": list(chosen["architectures"]), "models": list(chosen["models"])},
        "results": [_plain(result) for result in results],
    }


def _plain(result: Result) -> dict[str, Any]:
    """A result as plain data; strict JSON has no number that is not finite."""
    margins = {name: value if math.isfinite(value := getattr(result, name)) else str(value) for name in MARGINS}
    return asdict(result) | margins | {name: list(getattr(result, name)) for name in LISTS}


def machine() -> dict[str, str]:
    """What a run ran on; nothing that names the machine itself."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "CPU": _processor(),
        "cores": str(os.cpu_count()),
    }


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


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
        return parse(document)
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ReportError(f"{path} is no circuitfreeze report: {type(error).__name__}: {error}") from error


def parse(document: Mapping[str, Any]) -> Report:
    """The report that a document is.

    Raises:
        ValueError, KeyError, TypeError: it is none.
    """
    results = tuple(map(_result, document["results"]))
    started = datetime.fromisoformat(document["started"])
    ended = Ended(document["exit_status"], document["complete"], started, document["seconds"])
    return Report(document["settings"], document["environment"], ended, results)


def _result(entry: Mapping[str, Any]) -> Result:
    lists = {name: tuple(entry.get(name, ())) for name in LISTS}  # JSON has lists alone
    margins = {name: float(entry[name]) for name in MARGINS}
    return Result(**{**entry, **lists, **margins})
