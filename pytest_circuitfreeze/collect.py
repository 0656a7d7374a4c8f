"""Adds the shipped suites to a session, under ids that do not depend on where they are installed.

``circuitfreeze/<file>::<test>[...]`` is an interface: benchmark comparisons and users' scripts keep such ids.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from pytest_circuitfreeze.settings import settings_of

SUITES = "pytest_circuitfreeze.suites"
ROOT = "circuitfreeze"


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


class SuiteModule(pytest.Module):
    """One shipped file, imported by its full name and collected by our rules, not the user's."""

    def _getobj(self) -> ModuleType:
        name = f"{SUITES}.{self.path.stem}"
        try:
            return import_module(name)
        except ImportError as error:
            raise self.CollectError(f"cannot import {name}: {error}") from error

    def funcnamefilter(self, name: str) -> bool:
        """Claims are ``test_*``, and ``bench_*`` too in a file of benchmarks."""
        return name.startswith("test_") or (self.path.name.startswith("bench_") and name.startswith("bench_"))

    def classnamefilter(self, name: str) -> bool:
        """No classes: their methods would be subject to the user's ``python_functions``."""
        return False


class Suite(pytest.Collector):
    """The shipped suites as one branch of the session's tree."""

    def collect(self) -> Iterator[SuiteModule]:
        """One module a file."""
        for path in suite_files(bench=settings_of(self.config).bench):
            yield SuiteModule.from_parent(self, path=path, name=path.name, nodeid=f"{ROOT}/{path.name}")


class SuiteCollection:
    """The plugin object that a session with ``--circuitfreeze`` gets."""

    def __init__(self, config: pytest.Config) -> None:
        settings = settings_of(config)
        self._seed = settings.seed
        names = {ROOT} | {f"{ROOT}/{path.name}" for path in suite_files(bench=settings.bench)}
        self._asked = [argument for argument in config.args if _is_ours(argument)]
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
            report.result.append(Suite.from_parent(collector, name=ROOT, nodeid=ROOT))
        return report

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Seeds the shipped properties, and keeps those whose ids were given, if any were."""
        import hypothesis

        for item in items:
            if is_shipped(item) and hypothesis.is_hypothesis_test(item.obj):  # type: ignore[attr-defined]
                hypothesis.seed(self._seed)(item.obj)  # type: ignore[attr-defined]
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


def is_shipped(item: pytest.Item) -> bool:
    """Whether a test is one of the shipped suites', and not the project's own."""
    return item.getparent(Suite) is not None


def _file_of(argument: str) -> str:
    return argument.partition("::")[0].rstrip("/")


def _is_ours(argument: str) -> bool:
    """Ids of ours, unless the project has a folder of that name."""
    path = _file_of(argument)
    return (path == ROOT or path.startswith(f"{ROOT}/")) and not Path(path).exists()
