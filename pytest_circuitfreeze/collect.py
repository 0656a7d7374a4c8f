"""Adds the shipped suites to a session, under ids that do not depend on where they are installed.

``circuitfreeze/<file>::<test>[...]`` is an interface: benchmark comparisons and users' scripts keep such ids. Modules
that the hook ``pytest_circuitfreeze_claims`` adds are ``circuitfreeze/<module>::<test>[...]``.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, TypeGuard

import pytest

from pytest_circuitfreeze.accepted import AcceptedFailures, StaleEntry
from pytest_circuitfreeze.settings import settings_of

SUITES = "pytest_circuitfreeze.suites"
ROOT = "circuitfreeze"
MARKER = "circuitfreeze"


def suite_files(*, bench: bool) -> list[Path]:
    """The shipped test files, and the benchmark files if asked for, in an order that is the same everywhere.

    Raises:
        pytest.UsageError: the suites cannot be found.
    """
    found = find_spec(SUITES)
    if found is None or not found.submodule_search_locations:
        raise pytest.UsageError(
            f"{SUITES} not found: the current folder hides the installed package; start `pytest` and not "
            "`python -m pytest` here, or set PYTHONSAFEPATH=1"
        )
    folder = Path(next(iter(found.submodule_search_locations)))
    patterns = ("test_*.py", "bench_*.py") if bench else ("test_*.py",)
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


def added_modules(config: pytest.Config) -> dict[str, Path]:
    """Where the modules are that implementations of ``pytest_circuitfreeze_claims`` name, in their order.

    Raises:
        pytest.UsageError: what was given is no list of names, or there is no such module.
    """
    found: dict[str, Path] = {}
    for given in config.hook.pytest_circuitfreeze_claims(config=config):
        if isinstance(given, str) or not all(isinstance(name, str) for name in given):
            raise pytest.UsageError(f"pytest_circuitfreeze_claims gave {given!r}; give a list of names of modules")
        for name in given:
            found[name] = _source(name)
    return found


def _source(name: str) -> Path:
    try:
        found = find_spec(name)
    except (ImportError, ValueError) as error:  # a package above it that is not there, or a name that is none
        raise pytest.UsageError(f"pytest_circuitfreeze_claims: {name!r} cannot be found: {error}") from error
    if found is None or found.origin is None:
        raise pytest.UsageError(f"pytest_circuitfreeze_claims: {name!r} cannot be found; give a module's full name")
    return Path(found.origin)


class SuiteModule(pytest.Module):
    """One file of claims, imported by its full name and collected by our rules, not the user's."""

    def __init__(self, *, full_name: str, **node: Any) -> None:
        super().__init__(**node)
        self._full_name = full_name

    def _getobj(self) -> ModuleType:
        try:
            return import_module(self._full_name)
        except ImportError as error:
            raise self.CollectError(f"cannot import {self._full_name}: {error}") from error

    def funcnamefilter(self, name: str) -> bool:
        """Claims are ``test_*``, and ``bench_*`` too in a file of benchmarks."""
        return name.startswith("test_") or (self.path.name.startswith("bench_") and name.startswith("bench_"))

    def classnamefilter(self, name: str) -> bool:
        """No classes: their methods would be subject to the user's ``python_functions``."""
        return False


class Suite(pytest.Collector):
    """The shipped suites as one branch of the session's tree."""

    def collect(self) -> Iterator[SuiteModule]:
        """One module a file, the shipped ones first."""
        for path in suite_files(bench=settings_of(self.config).bench):
            yield self._module(f"{SUITES}.{path.stem}", path, path.name)
        for name, path in added_modules(self.config).items():
            pytest.register_assert_rewrite(name)
            yield self._module(name, path, name)

    def _module(self, full_name: str, path: Path, shown: str) -> SuiteModule:
        made: SuiteModule = SuiteModule.from_parent(
            self, full_name=full_name, path=path, name=shown, nodeid=f"{ROOT}/{shown}"
        )
        return made


class SuiteCollection:
    """The plugin object that a session with ``--circuitfreeze`` gets."""

    def __init__(self, config: pytest.Config) -> None:
        settings = settings_of(config)
        self._seed = settings.seed
        files = [path.name for path in suite_files(bench=settings.bench)]
        names = {ROOT} | {f"{ROOT}/{name}" for name in (*files, *added_modules(config))}
        self._asked = [argument for argument in config.args if _is_ours(argument)]
        # A run of some files alone lacks the claims of others, which an accepted failure may be about.
        self._whole = not config.known_args_namespace.file_or_dir
        for argument in self._asked:
            if _file_of(argument) not in names:
                shipped = ", ".join(sorted(names - {ROOT}))
                raise pytest.UsageError(f"not in the circuitfreeze suites: {argument} (there are {shipped})")
        # pytest would look for them on disk.
        config.args[:] = [argument for argument in config.args if argument not in self._asked]

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(
        self, collector: pytest.Collector
    ) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        """The session collects what it would have, and then the suites."""
        report = yield
        if isinstance(collector, pytest.Session) and report.passed:
            suite: Suite = Suite.from_parent(collector, name=ROOT, nodeid=ROOT)
            suite.add_marker(MARKER)
            report.result.append(suite)
        return report

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(
        self, session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Seeds the shipped properties, adds stale entries of the accepted failures, and keeps what was asked for."""
        import hypothesis

        if self._whole:
            items += _stale_entries(session, items)
        for item in items:
            if isinstance(item, pytest.Function) and is_shipped(item) and hypothesis.is_hypothesis_test(item.obj):
                hypothesis.seed(self._seed)(item.obj)
        if not self._asked:
            return
        dropped = [item for item in items if is_shipped(item) and not self._is_asked(item.nodeid)]
        if dropped:
            config.hook.pytest_deselected(items=dropped)
            items[:] = [item for item in items if item not in dropped]

    def _is_asked(self, nodeid: str) -> bool:
        for argument in self._asked:
            start = argument.rstrip("/")
            if nodeid == start or nodeid.startswith((f"{start}/", f"{start}::", f"{start}[")):
                return True
        return False


def _stale_entries(session: pytest.Session, items: list[pytest.Item]) -> list[StaleEntry]:
    settings = settings_of(session.config)
    entries = AcceptedFailures(settings.accepted).unmatched(filter(is_claim, items), settings.targets)
    return [
        StaleEntry.from_parent(
            session,
            name=f"{entry.claim}[{entry.model}]",
            nodeid=f"{ROOT}/accepted::{entry.claim}[{entry.model}]",
            entry=entry,
            engine=settings.engine,
        )
        for entry in entries
    ]


def is_shipped(item: pytest.Item) -> bool:
    """Whether a test is one of the shipped suites' (or added to them by a hook), and not the project's own."""
    return item.getparent(Suite) is not None


def is_claim(item: pytest.Item) -> TypeGuard[pytest.Function]:
    """Whether a test is in the table: a shipped one, or a project's own that is marked as a claim."""
    return isinstance(item, pytest.Function) and item.get_closest_marker(MARKER) is not None


def _file_of(argument: str) -> str:
    return argument.partition("::")[0].rstrip("/")


def _is_ours(argument: str) -> bool:
    """Ids of ours, unless the project has a folder of that name."""
    path = _file_of(argument)
    return (path == ROOT or path.startswith(f"{ROOT}/")) and not Path(path).exists()
