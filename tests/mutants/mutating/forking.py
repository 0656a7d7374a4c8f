"""Runs tests that are collected already in a process that is thrown away."""

from __future__ import annotations

import os
import resource
import signal
import time
import traceback
from collections.abc import Callable, Sequence

import pytest

MEMORY = 12 * 2**30


class ForkError(Exception):
    """The work did not come to its end: it raised, or a signal ended it."""


def in_fork(work: Callable[[], str]) -> str:
    """What `work` returns, called in a fork of this process; `TimeoutError` where a limit ended it.

    Anything else that ends it, be it an exit, is a `ForkError`.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        status = 0
        try:
            said = work()
        except BaseException as error:
            said, status = "".join(traceback.format_exception_only(error)), 1
        with os.fdopen(writing, "w") as answer:
            answer.write(said)
        os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as answer:
        said = answer.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status in (-signal.SIGXCPU, -signal.SIGALRM):
        raise TimeoutError(signal.Signals(-status).name)
    if status:
        raise ForkError(said.strip() or f"exit status {status}")
    return said


def limit(seconds: float) -> None:
    """Ends this process where the next test, which takes so many seconds of the processor, takes far longer.

    A loop without an end uses up the processor; what waits without using it is ended by the clock, which is generous
    since the machine may have other work.
    """
    allowed = time.process_time() + 10 * seconds + 10
    resource.setrlimit(resource.RLIMIT_CPU, (int(allowed) + 1, resource.RLIM_INFINITY))
    signal.alarm(int(60 * seconds) + 120)


def run_until_failure(
    items: Sequence[pytest.Item],
    before: Callable[[pytest.Item], None],
    after: Callable[[pytest.Item], None] = lambda item: None,
) -> str:
    """Runs these tests in this order, silently, up to the first that fails: its id, or nothing."""
    if not items:
        return ""
    plugins = items[0].config.pluginmanager
    plugins.unregister(name="terminalreporter")
    failures = _Failures()
    plugins.register(failures)
    for item, following in zip(items, [*items[1:], None], strict=True):
        before(item)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        after(item)
        if failures.first:
            break
    return failures.first


class _Failures:
    """Keeps the id of the first test that failed."""

    first = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.first:
            self.first = report.nodeid
