"""What a shipped test shows when it fails: the finding and how to run it again, not the machinery around it."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING

import pytest

from pytest_circuitfreeze.options import OPTIONS
from pytest_circuitfreeze.results import model_of
from pytest_circuitfreeze.settings import Settings

if TYPE_CHECKING:
    from pytest_circuitfreeze.suites.claims import ClaimBroken

NOT_AGAIN = "the same example held when it was tried again: the engine or the model is no longer what it was"

# Hypothesis lists the arguments indented by four spaces, and what belongs to one of them by more.
_FIXTURE_ARGUMENT = re.compile(r"^    circuit_\w+=.*?(?=^    \w+=|^\))", re.MULTILINE | re.DOTALL)
# What a run must share with the one that failed, beside the model.
_CONDITIONS = ("engine", "profile", "seed", "device", "dtype", "attn")


def shorten(item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport, settings: Settings) -> None:
    """Rewrites the report of a test that failed, unless the user chose a style of traceback with ``--tb``."""
    if call.excinfo is not None and item.config.getoption("tbstyle") == "auto":
        error = call.excinfo.value
        broken = broken_claim(error)
        if broken is not None:
            _show(broken, report)
            if broken is not error:
                report.sections.append(("not again", NOT_AGAIN))
        elif getattr(error, "__notes__", None):
            error.__notes__ = [_FIXTURE_ARGUMENT.sub("", note) for note in error.__notes__]
            report.longrepr = item.repr_failure(call.excinfo)
    report.sections.append(("run it again", command(item, settings)))


def _show(broken: ClaimBroken, report: pytest.TestReport) -> None:
    """Puts the claim's own words in the place of a traceback, and the snippet below, where it can be copied."""
    shown = pytest.ExceptionInfo.from_exception(broken).getrepr(style="value")
    if shown.reprcrash is not None:
        # pytest's last lines show as much of it as fits: the finding, not the name of the class.
        shown.reprcrash.message = broken.headline
    report.longrepr = shown
    if broken.call is not None:
        report.sections.append(("without pytest", broken.call.snippet))


def broken_claim(error: BaseException | None) -> ClaimBroken | None:
    """The broken claim that an error is, or that is in the group which Hypothesis raises of what it saw only once."""
    from pytest_circuitfreeze.suites.claims import ClaimBroken

    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(broken_claim, error.exceptions)), None)
    return error if isinstance(error, ClaimBroken) else None


def command(item: pytest.Item, settings: Settings) -> str:
    """The command line that runs one shipped test again under the same conditions."""
    words = ["pytest", "--circuitfreeze"]
    model = model_of(item)
    if model is not None and model not in settings.factories:  # a hook adds them to every run
        words += ["--circuitfreeze-model" if model in settings.models else "--circuitfreeze-arch", model]
    for option in OPTIONS:
        value = getattr(settings, option.word) if option.word in _CONDITIONS else None
        if value is not None and value != option.default:
            words += [option.flag, str(value)]
    return shlex.join([*words, item.nodeid])
