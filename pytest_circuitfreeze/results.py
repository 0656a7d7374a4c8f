"""One result a test: recorded where the test runs, carried by its report, read where the session ends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from pytest_circuitfreeze.suites.claims import ClaimBroken

PREFIX = "circuitfreeze."
FAILURE = "failure."
WITHOUT_MODEL = "(none)"
"""The model of a test that is about none."""


class Margin(Protocol):
    """What a check returns: its largest error beside the bound it was held to (0.0: bit for bit)."""

    @property
    def error(self) -> float:
        """The largest error seen."""

    @property
    def bound(self) -> float:
        """The largest error allowed."""


class CircuitRecord:
    """Collects the margins of one test's examples; the ``circuit_record`` fixture."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets everything, for the next test."""
        self.examples = 0
        self.error = 0.0
        self.bound = 0.0
        self.silent = ""
        self.refused = ""
        self.refusals: list[str] = []
        self.not_offered: list[str] = []
        self.drawn_anew = 0

    def not_applicable(self, reason: str) -> None:
        """The claim says nothing about the model (in this example), and why."""
        self.silent = reason

    def refused_model(self, reason: str) -> None:
        """The engine refuses the model as a whole, as a test has seen, and why."""
        self.refused = reason

    def refused_config(self, reason: str) -> None:
        """The engine refuses to freeze the model in one way, and why."""
        if reason not in self.refusals:
            self.refusals.append(reason)

    def not_offered_config(self, reason: str) -> None:
        """The engine does not claim to freeze the model in one way, or at all, and why."""
        if reason not in self.not_offered:
            self.not_offered.append(reason)

    @property
    def offers_nothing(self) -> bool:
        """Whether the engine claimed nothing of what it was to be asked, and that is all there is to say."""
        return bool(self.not_offered) and self.examples == 0 and not self.silent

    def observe(self, margin: Margin) -> None:
        """Counts one example and keeps the margin that came closest to its bound.

        Raises:
            AssertionError: the margin is beyond its bound or not a number, so its check let a broken claim pass.
        """
        error, bound = float(margin.error), float(margin.bound)
        if not 0.0 <= error <= bound:
            raise AssertionError(f"a check passed an error of {error} where the bound is {bound}")
        if self.examples == 0 or (used(error, bound), bound) > (used(self.error, self.bound), self.bound):
            self.error, self.bound = error, bound
        self.examples += 1


def used(error: float, bound: float) -> float:
    """How much of its bound an error uses, 0 to 1; 0 where both are 0, bit for bit."""
    if bound == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return error / bound


@dataclass(frozen=True)
class Result:
    """One claim that was tried: a shipped test, or a project's own that is marked as one."""

    id: str
    claim: str
    sentence: str
    model: str | None
    engine: str
    outcome: str
    """``passed``, ``failed``, ``accepted``, ``error`` (in set-up or tear-down), ``skipped``, ``refused``,
    ``not offered`` or ``n/a``."""
    seconds: float
    examples: int
    error: float
    bound: float
    message: str
    refusals: tuple[str, ...] = ()
    """Why the engine refused some of the configs that were drawn."""
    not_offered: tuple[str, ...] = ()
    """Why the engine does not claim to serve some of them, or any."""
    failure: Mapping[str, Any] | None = None
    """The claim that broke: :func:`broken`'s facts."""
    benchmark: Mapping[str, Any] | None = None
    """What was measured, of a benchmark: ``group``, ``row``, ``engine``, ``ratios``, ``target``, ``missing``."""

    @property
    def file(self) -> str:
        """The file that holds the test, as its id has it: ``circuitfreeze/test_<subject>.py`` for a shipped one."""
        return self.id.partition("::")[0]

    @property
    def is_benchmark(self) -> bool:
        """Whether it is a shipped test that measures and claims nothing."""
        return self.file.startswith("circuitfreeze/bench_")


def describe(item: pytest.Function, engine: str) -> list[tuple[str, object]]:
    """What is known of a test before it runs, as properties of its report."""
    documented = (item.obj.__doc__ or "").strip() or item.name
    facts: dict[str, object] = {
        "claim": claim_of(item),
        "sentence": documented.splitlines()[0],
        "model": model_of(item),
        "engine": engine,
    }
    return [(PREFIX + key, value) for key, value in facts.items() if value is not None]


def without_results(properties: Iterable[tuple[str, object]]) -> list[tuple[str, object]]:
    """The properties of a test that are not ours."""
    return [(key, value) for key, value in properties if not key.startswith(PREFIX)]


def claim_of(item: pytest.Function) -> str:
    """The name of the claim that a test is about: its own, without ``test_``."""
    name: str = getattr(item, "originalname", item.name)
    return name.partition("_")[2] or name


def model_of(item: pytest.Item) -> str | None:
    """The name of the model that a test is about, as given to ``circuit_model``."""
    callspec = getattr(item, "callspec", None)
    model: str | None = callspec.params.get("circuit_model") if callspec else None
    return model


def measured(record: CircuitRecord) -> list[tuple[str, object]]:
    """What a test found, as properties of its report."""
    facts: dict[str, object] = {"examples": record.examples, "error": record.error, "bound": record.bound}
    told = {"silent": record.silent, "refused": record.refused}
    several = {"refusals": list(record.refusals), "not_offered": list(record.not_offered)}
    facts |= {name: value for name, value in {**told, **several}.items() if value}
    return [(PREFIX + key, value) for key, value in facts.items()]


def benchmarked(item: pytest.Function) -> list[tuple[str, object]]:
    """What a benchmark put on record, as a property of its report; nothing of what is none."""
    fixture: Any = item.funcargs.get("benchmark")
    if fixture is None or "ratios" not in fixture.extra_info:
        return []
    return [(PREFIX + "benchmark", {"group": fixture.group, **fixture.extra_info})]


def broken(error: ClaimBroken) -> list[tuple[str, object]]:
    """How a claim broke, as properties of a report: the example, and the error with its place and its bound."""
    facts: dict[str, object] = {"claim": error.sentence, "found": error.found, "place": error.place}
    if error.margin is not None:
        facts |= {"error": _plain(error.margin.error), "bound": error.margin.bound}
    if error.call is not None:
        facts |= {"arguments": error.call.circumstances(), "snippet": error.call.snippet}
    return [(PREFIX + FAILURE + key, value) for key, value in facts.items()]


def _plain(number: float) -> float | str:
    """A number for strict JSON, which has none that is not finite."""
    return number if math.isfinite(number) else str(number)


class Results:
    """The results of a session, by file and place in it. Iterates over :class:`Result`."""

    def __init__(self) -> None:
        self._reports: dict[str, list[pytest.TestReport]] = {}

    def add(self, report: pytest.TestReport, engine: str) -> None:
        """Takes the report of any phase of any test, and keeps those of claims.

        A worker that dies leaves one that knows nothing but the test's id; of a shipped test that is enough.
        """
        claimed = any(key == PREFIX + "claim" for key, _ in report.user_properties)
        known = report.nodeid in self._reports
        if report.failed and not claimed and not known and report.nodeid.startswith("circuitfreeze/"):
            report.user_properties = [(PREFIX + key, value) for key, value in _named(report.nodeid, engine).items()]
            claimed = True
        if claimed or known:
            if report.when == "setup":  # of a test that is run again, the last run counts
                self._reports[report.nodeid] = []
            self._reports.setdefault(report.nodeid, []).append(report)

    def __len__(self) -> int:
        return len(self._reports)

    def __iter__(self) -> Iterator[Result]:
        # Workers end their tests in any order, and nothing that is shown or written may depend on that.
        in_order = sorted(self._reports.values(), key=lambda reports: _place(reports[0]))
        return (_result(reports) for reports in in_order)


def _named(nodeid: str, engine: str) -> dict[str, object]:
    """What the id of a shipped test tells of it."""
    name, _, model = nodeid.rpartition("::")[2].partition("[")
    claim = name.partition("_")[2]
    return {"engine": engine, "claim": claim, "sentence": claim, "model": model.removesuffix("]") or None}


def _place(report: pytest.TestReport) -> tuple[str, int, str]:
    return report.nodeid.partition("::")[0], report.location[1] or 0, report.nodeid


def _result(reports: list[pytest.TestReport]) -> Result:
    # Each phase's report carries the properties so far.
    facts: dict[str, Any] = {
        key.removeprefix(PREFIX): value
        for report in reports
        for key, value in report.user_properties
        if key.startswith(PREFIX)
    }
    return Result(
        id=reports[0].nodeid,
        claim=facts["claim"],
        sentence=facts["sentence"],
        model=facts.get("model"),
        engine=facts["engine"],
        outcome=_outcome(reports, facts),
        seconds=sum(report.duration for report in reports),
        examples=facts.get("examples", 0),
        error=facts.get("error", 0.0),
        bound=facts.get("bound", 0.0),
        message=facts.get("accepted", "") or _message(reports) or facts.get("refused", "") or facts.get("silent", ""),
        refusals=tuple(facts.get("refusals", ())),
        not_offered=tuple(facts.get("not_offered", ())),
        benchmark=facts.get("benchmark"),
        failure={key.removeprefix(FAILURE): facts[key] for key in facts if key.startswith(FAILURE)} or None,
    )


def _outcome(reports: Iterable[pytest.TestReport], facts: Mapping[str, Any]) -> str:
    by_phase = {report.when: report.outcome for report in reports}
    if by_phase.get("call") == "failed":
        return "failed"
    if "failed" in by_phase.values():
        return "error"
    if facts.get("accepted"):
        return "accepted"
    if "skipped" in by_phase.values():
        return "not offered" if facts.get("not_offered") and not facts.get("examples") else "skipped"
    if by_phase.get("call") != "passed":  # a worker that died leaves no report of the call
        return "error"
    if facts.get("refused"):
        return "refused"
    return "n/a" if facts.get("silent") and not facts.get("examples") else "passed"


def _message(reports: Iterable[pytest.TestReport]) -> str:
    """The line pytest's own summary would show for what went wrong; empty where nothing did."""
    for report in reports:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            # Of a worker that died it is a text, which `longreprtext` would put behind the worker's name.
            text = report.longrepr if isinstance(report.longrepr, str) else report.longreprtext
            return str(crash.message if crash else text).strip().partition("\n")[0]
        if report.skipped and isinstance(report.longrepr, tuple):
            return str(report.longrepr[2])
    return ""
