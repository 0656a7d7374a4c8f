"""A pytest plugin: collects the tests once; then, for each mutant in a fork of its own, runs those that reach it."""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import coverage
import pytest
from hypothesis import Phase, settings

import freeze_core
from mutating import results
from mutating.applying import Key, apply, live_functions
from mutating.forking import ForkError, in_fork, limit, run_until_failure
from mutating.making import Mutant, mutants_of, source_of
from mutating.results import Result

PACKAGE = Path(freeze_core.__file__).parent
BUDGET = 40.0
"""Seconds of the processor that the tests of one mutant take together at most, without the mutant."""

# No smaller example is looked for, and what one mutant failed on is not tried on the next.
settings.register_profile(
    "mutants", database=None, derandomize=True, deadline=None, phases=(Phase.explicit, Phase.generate)
)
settings.load_profile("mutants")


class Test(NamedTuple):
    """A test, and the seconds of the processor that it takes."""

    item: pytest.Item
    seconds: float


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options that `python -m mutating` fills in."""
    group = parser.getgroup("mutants")
    group.addoption("--mutants", type=int, default=0, metavar="N", help="how many mutants to have results for; 0: all")
    group.addoption("--mutants-again", action="store_true", help="try again those that were not killed")
    group.addoption("--mutants-results", type=Path, metavar="FILE", help="one JSON object a line; read, then added to")
    group.addoption("--mutants-map", type=Path, metavar="FILE", help="JSON: which tests run which line")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool:
    """Takes the place of pytest's loop over the tests."""
    options, terminal = session.config.option, session.config.get_terminal_writer()
    reach = _reach(options.mutants_map, session.items)
    tests = [Test(*each) for each in zip(session.items, reach["seconds"], strict=True)]
    live = live_functions(PACKAGE.name)
    chosen = [mutant for mutant in mutants_of(PACKAGE) if not mutant.is_text][: options.mutants or None]
    known = results.read(options.mutants_results)
    for number, mutant in enumerate(chosen, start=1):
        if mutant.name in known and (known[mutant.name].is_killed or not options.mutants_again):
            continue
        reached = [tests[each] for each in reach["lines"].get(f"{mutant.module}:{mutant.line}", ())]
        result = _tried(mutant, reached, live)
        results.add(options.mutants_results, result)
        terminal.line(f"{number}/{len(chosen)} {result.outcome} {mutant.module}:{mutant.line} {result.by}")
    return True


def _reach(path: Path, items: Sequence[pytest.Item]) -> dict[str, Any]:
    """Which tests run which line: read from the file, which is made anew where code or tests are others."""
    digest = hashlib.sha256(b"\0".join(file.read_bytes() for file in sorted(PACKAGE.rglob("*.py")))).hexdigest()
    names = [item.nodeid for item in items]
    if path.exists():
        reach: dict[str, Any] = json.loads(path.read_text())
        if (reach["code"], reach["tests"]) == (digest, names):
            return reach
    reach = {"code": digest, "tests": names, **json.loads(in_fork(lambda: json.dumps(_mapped(items))))}
    _check_without_mutant([Test(*each) for each in zip(items, reach["seconds"], strict=True)])
    path.write_text(json.dumps(reach))
    return reach


def _mapped(items: Sequence[pytest.Item]) -> dict[str, Any]:
    """Runs all tests once: the seconds of each, and by line the numbers of those that run it."""
    measured = coverage.Coverage(data_file=None, include=[f"{PACKAGE}/*"], config_file=False, messages=False)
    seconds = []

    def began(item: pytest.Item) -> None:
        seconds.append(-time.process_time())
        measured.switch_context(item.nodeid)

    def ended(item: pytest.Item) -> None:
        seconds[-1] += time.process_time()

    measured.start()
    failed = run_until_failure(items, began, ended)
    measured.stop()
    if failed:
        raise AssertionError(f"{failed} fails without any mutant, and so would kill each that it meets")
    numbers = {item.nodeid: number for number, item in enumerate(items)}
    data = measured.get_data()
    lines = {
        f"{'.'.join(Path(file).relative_to(PACKAGE.parent).with_suffix('').parts)}:{line}": sorted(
            numbers[context] for context in contexts if context
        )
        for file in data.measured_files()
        for line, contexts in data.contexts_by_lineno(file).items()
    }
    return {"seconds": seconds, "lines": lines}


def _check_without_mutant(tests: Sequence[Test]) -> None:
    """Runs the tests as a mutant's are run, in that order and with those limits, but without a mutant: they pass."""
    seconds = {test.item: test.seconds for test in _within_budget(tests)}
    failed = in_fork(lambda: run_until_failure([*seconds], lambda item: limit(seconds[item])))
    if failed:
        raise AssertionError(f"{failed} fails without any mutant when it is run in another order")


def _tried(mutant: Mutant, reached: Sequence[Test], live: Mapping[Key, Sequence[FunctionType]]) -> Result:
    """Runs the tests that reach the mutant, under it."""
    path = source_of(PACKAGE, mutant.module)
    seconds = {test.item: test.seconds for test in _within_budget(reached)}

    def run() -> str:
        if not apply(mutant, path, live):
            return "invalid"
        failed = run_until_failure([*seconds], lambda item: limit(seconds[item]))
        return f"killed {failed}" if failed else "survived" if seconds else "unreached"

    try:
        outcome, _, by = in_fork(run).partition(" ")
    except TimeoutError:
        outcome, by = "timeout", ""
    except ForkError as error:
        outcome, by = "killed", str(error)
    return Result(mutant.name, outcome, by, len(seconds), len(reached), first=outcome)


def _within_budget(reached: Sequence[Test]) -> list[Test]:
    """First the fastest case of each test function, then the next case of each, as far as the budget goes."""
    cases: dict[str, int] = defaultdict(int)
    ranked = []
    for test in sorted(reached, key=lambda test: test.seconds):
        function = test.item.nodeid.partition("[")[0]
        ranked.append((cases[function], test))
        cases[function] += 1
    ordered = [test for _, test in sorted(ranked, key=lambda each: (each[0], each[1].seconds))]
    spent = accumulate(test.seconds for test in ordered)
    return [test for test, total in zip(ordered, spent, strict=True) if total <= BUDGET]
