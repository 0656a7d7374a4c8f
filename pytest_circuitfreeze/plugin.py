"""The hooks of the plugin. Loaded by every pytest run on a machine, so it imports nothing heavy."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pytest_circuitfreeze import fixtures, github, hooks
from pytest_circuitfreeze.accepted import AcceptedFailures
from pytest_circuitfreeze.collect import MARKER, ROOT, SuiteCollection, is_claim
from pytest_circuitfreeze.failures import broken_claim, shorten
from pytest_circuitfreeze.options import add_options
from pytest_circuitfreeze.required_claims import lost_claim
from pytest_circuitfreeze.results import CircuitRecord, Results, benchmarked, broken, describe, measured, model_of
from pytest_circuitfreeze.settings import WORKER_SEED, is_enabled, is_listing, settings_of
from pytest_circuitfreeze.summary import header, versions, write_summary
from pytest_circuitfreeze.threads import is_small, one_thread


def pytest_addoption(parser: pytest.Parser) -> None:
    """Every option, with its ini twin."""
    add_options(parser)


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """The hooks that a project or a plugin may implement."""
    pluginmanager.add_hookspecs(hooks)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Shows what there is instead of a run, if that was asked for."""
    if not is_listing(config):
        return None
    from pytest_circuitfreeze.listing import listing

    print(listing())
    return 0


# Before Hypothesis's own, which looks up the profile that --hypothesis-profile names.
@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Reads the options and adds the suites, if they were asked for."""
    config.stash[fixtures.RECORD] = CircuitRecord()
    config.pluginmanager.register(fixtures, "circuitfreeze-fixtures")
    config.addinivalue_line(
        "markers",
        f"{MARKER}: the test is a claim, named by the first line of its docstring; with --circuitfreeze it stands in "
        "the table and the report beside the shipped ones",
    )
    if not is_enabled(config):
        for flag in ("--circuitfreeze-bench", "--circuitfreeze-report"):
            if config.getoption(flag) is not None:
                raise pytest.UsageError(f"{flag} is about the shipped suites; give --circuitfreeze too")
        return
    settings = settings_of(config)
    if settings.report is not None:
        _make_folder(settings.report)
    if settings.bench:
        _check_benchmarks_can_run(config)
    elif settings.bench_limit is not None:
        raise pytest.UsageError("--circuitfreeze-bench-limit is about the benchmarks; give --circuitfreeze-bench too")
    from pytest_circuitfreeze.profiles import register

    register(settings.profile)
    config.pluginmanager.register(SuiteCollection(config), "circuitfreeze-collection")
    config.pluginmanager.register(SuiteRun(config), "circuitfreeze-run")


def _make_folder(path: Path) -> None:
    """A folder that cannot be had is told before the run, not behind it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise pytest.UsageError(f"--circuitfreeze-report: {str(path)!r} cannot be made: {error.strerror}") from error


def _check_benchmarks_can_run(config: pytest.Config) -> None:
    """A benchmark that pytest-benchmark would quietly not measure is refused."""
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("--circuitfreeze-bench needs the plugin pytest-benchmark, which is not loaded")
    if hasattr(config, "workerinput") or config.getoption("dist", "no") != "no":
        raise pytest.UsageError("--circuitfreeze-bench measures in one process; leave out -n")


class SuiteRun:
    """Follows a run of the suites: header, one result a claim, summary and report."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._settings = settings_of(config)
        self._record = config.stash[fixtures.RECORD]
        self._accepted = AcceptedFailures(self._settings.accepted)
        self._results = Results()
        self._started = datetime.now(UTC)
        self._chosen: set[str] = set()
        self._ended: set[str] = set()
        self._uncollected = False
        self._report_lines: list[str] = []

    def pytest_report_header(self) -> str:
        """What is under test, and how."""
        return header(self._settings)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Hands the seed to a worker of a distributed run, which cannot draw the same one."""
        node.workerinput[WORKER_SEED] = self._settings.seed

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Keeps which tests there are to run."""
        self._chosen.update(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        """The same of a distributed run, whose controller collects nothing itself."""
        self._chosen.update(ids)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Keeps whether some file could not be collected."""
        self._uncollected |= report.failed

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Names the claim, also for a test whose set-up fails."""
        if is_claim(item):
            self._record.clear()
            item.user_properties.extend(describe(item, self._settings.engine))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """Adds what the test found, also where it failed. A claim that the engine does not offer is no pass."""
        small = is_claim(item) and (
            model_of(item) in self._settings.architectures or is_small(item.funcargs.get("circuit_model"))
        )
        try:
            with one_thread() if small else nullcontext():
                result = yield
        except Exception as error:
            if is_claim(item) and (claim := broken_claim(error)) is not None:
                item.user_properties.extend(broken(claim))
            raise
        finally:
            if is_claim(item):
                item.user_properties.extend([*measured(self._record), *benchmarked(item)])
        if is_claim(item) and self._record.offers_nothing:
            pytest.skip(f"not offered: {'; '.join(self._record.not_offered)}")
        if is_claim(item) and item.nodeid.startswith(f"{ROOT}/"):
            lost = lost_claim(model_of(item), self._settings.engine, self._record.silent)
            if lost:
                pytest.fail(lost, pytrace=False)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Keeps the report of a claim that failed to what a person needs, and compares it with the accepted ones."""
        report = yield
        if report.when == "call" and is_claim(item):
            if report.failed:
                shorten(item, call, report, self._settings)
            self._accepted.judge(item, report)
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keeps every report of a claim; in a distributed run the controller gets all of them."""
        if report.when == "teardown":
            self._ended.add(report.nodeid)
        self._results.add(report, self._settings.engine)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Writes the report, on the controller alone; one that cannot be written fails the run."""
        wanted = self._settings.report is not None or github.summary_is_wanted()
        if not wanted or hasattr(self._config, "workerinput") or self._config.option.collectonly:
            return
        if session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
            self._report_lines.append("report: nothing was run; a former report is as it was")
            return
        document = self._document(session)
        for write in (self._write_report, self._add_summary):
            try:
                self._report_lines += write(document)
            except Exception as error:  # a traceback here would hide what the run found
                self._report_lines.append(f"ERROR the report cannot be written: {type(error).__name__}: {error}")
                session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED

    def _document(self, session: pytest.Session) -> dict[str, Any]:
        from pytest_circuitfreeze import reports

        # Whatever ended the run early, a worker's death among it: a test that has not ended is missing.
        complete = self._chosen <= self._ended and not self._uncollected
        seconds = (datetime.now(UTC) - self._started).total_seconds()
        ended = reports.Ended(int(session.exitstatus), complete, self._started, seconds)
        return reports.build(self._settings, versions(), self._results, ended)

    def _write_report(self, document: dict[str, Any]) -> list[str]:
        """Writes the files that were asked for, and says where they are."""
        from pytest_circuitfreeze import reports

        if self._settings.report is None:
            return []
        lines = [f"report: {path}" for path in reports.write(document, self._settings.report)]
        if not reports.plots.available():
            lines.append(f"report: no plots, which need matplotlib ({reports.plots.EXTRA})")
        return lines

    def _add_summary(self, document: dict[str, Any]) -> list[str]:
        from pytest_circuitfreeze import reports

        github.add_summary(reports.markdown.render(reports.parse(document)))
        return []

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """The table. Workers have no terminal, so only the controller comes here."""
        results = list(self._results)
        if results:
            write_summary(terminalreporter, results, self._settings)
        for line in (*self._report_lines, *github.workflow_commands(results)):
            self._config.get_terminal_writer().line(line)
