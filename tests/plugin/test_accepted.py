"""The list of accepted failures: what it turns, what is stale, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tables import table

from pytest_circuitfreeze.accepted import Accepted, parse_accepted

Run = Callable[..., pytest.RunResult]
ON = ("--circuitfreeze", "--circuitfreeze-arch", "gpt2,falcon_mqa")
BREAKS = """
    def test_breaks(circuit_model):
        '''A claim that one model breaks.'''
        assert circuit_model == "gpt2", "another model"
"""
WORKERS = pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["one process", "two workers"])


def accept(*lines: str) -> None:
    Path("pytest.ini").write_text("\n    ".join(["[pytest]\ncircuitfreeze_accepted =", *lines]))


@WORKERS
def test_an_accepted_failure_is_neither_passed_nor_failed(stand_in: Run, workers: tuple[str, ...]) -> None:
    accept("breaks falcon_mqa: ours to mend, in #12")
    result = stand_in(*ON, "-rx", "--circuitfreeze-report=out", *workers, test_gamma=BREAKS)
    assert result.ret == 0
    result.assert_outcomes(passed=7, xfailed=1)
    result.stdout.fnmatch_lines(
        ["XFAIL circuitfreeze/test_gamma.py::test_breaks?falcon_mqa? - accepted: ours to mend*"]
    )
    shown = table(result)
    assert "  breaks           pass    accepted      -" in shown
    assert "falcon_mqa accepted (breaks): ours to mend, in #12" in shown
    assert "4 claims on 2 models: 1 accepted, 7 passed; 52 examples" in shown
    document = json.loads(Path("out/report.json").read_text())
    assert document["settings"]["accepted"] == ["breaks falcon_mqa: ours to mend, in #12"]
    assert [one["message"] for one in document["results"] if one["outcome"] == "accepted"] == ["ours to mend, in #12"]
    text = Path("out/report.md").read_text()
    assert "| accepted " in text
    assert "falcon\\_mqa accepted (breaks): ours to mend, in \\#12" in text


@WORKERS
def test_an_entry_whose_test_passes_fails_the_run(stand_in: Run, workers: tuple[str, ...]) -> None:
    accept("breaks falcon_mqa: known", "a property gpt2: fixed since")
    result = stand_in(*ON, *workers, test_gamma=BREAKS)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=6, failed=1, xfailed=1)
    message = "accepted as a failure, and does not fail; remove the entry: a_property gpt2: fixed since"
    result.stdout.fnmatch_lines([message])
    assert "  a property       FAIL        pass    25%" in table(result)


@WORKERS
def test_an_entry_that_matches_nothing_fails_the_run(stand_in: Run, workers: tuple[str, ...]) -> None:
    accept("bakes falcon_mqa: a slip of the pen")
    result = stand_in(*ON, *workers)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=6, failed=1)
    result.stdout.fnmatch_lines(
        [
            "accepted as a failure, and no claim is called so; remove the entry: bakes falcon_mqa: a slip of the pen",
            "FAILED circuitfreeze/accepted::bakes?falcon_mqa?*",
        ]
    )


def test_an_entry_about_another_model_is_told_and_no_failure(stand_in: Run) -> None:
    accept("breaks llama: of another run")
    result = stand_in(*ON)
    assert result.ret == 0
    assert "accepted, of a model that is not in this run: breaks llama: of another run" in table(result)


def test_a_part_of_the_run_does_not_make_the_rest_stale(stand_in: Run) -> None:
    accept("breaks falcon_mqa: known", "mine (none): known, too")
    assert stand_in(*ON, "-k", "property", test_gamma=BREAKS).ret == 0
    assert stand_in(*ON, "circuitfreeze/test_alpha.py", test_gamma=BREAKS).ret == 0


def test_a_set_up_that_fails_is_not_accepted(stand_in: Run) -> None:
    broken = """
        import pytest

        @pytest.fixture
        def broken():
            raise RuntimeError("no set-up today")

        def test_breaks(circuit_model, broken): pass
    """
    accept("breaks gpt2: known")
    result = stand_in("--circuitfreeze", "--circuitfreeze-arch=gpt2", "-k", "breaks", test_gamma=broken)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(errors=1, deselected=3)


def test_the_command_line_takes_the_place_of_the_ini_file(stand_in: Run) -> None:
    accept("a property gpt2: stale, if it counted")
    entry = "--circuitfreeze-accepted=breaks falcon_mqa: known"
    stand_in(*ON, entry, "circuitfreeze", test_gamma=BREAKS).assert_outcomes(passed=7, xfailed=1)


@pytest.mark.parametrize("line", ["breaks gpt2", "breaks: known", "gpt2", "breaks gpt2:known", ": known", ""])
def test_an_entry_of_another_form_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="accepts no failure; give 'claim model: reason'"):
        parse_accepted(line)


@pytest.mark.parametrize("line", ["breaks gpt2:", "breaks gpt2:  "])
def test_an_entry_without_a_reason_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=f"'{line}' gives no reason"):
        parse_accepted(line)


def test_an_entry_takes_a_claim_in_words_and_any_model() -> None:
    entry = parse_accepted("qk leaves ov mine.models:build: see #3: it is known")
    assert (entry.claim, entry.model, entry.reason) == ("qk_leaves_ov", "mine.models:build", "see #3: it is known")
    assert entry == Accepted("qk_leaves_ov", "mine.models:build", "another reason")


def test_one_failure_is_accepted_once(pytester: pytest.Pytester) -> None:
    entries = ("--circuitfreeze-accepted=breaks gpt2: one", "--circuitfreeze-accepted=breaks gpt2: other")
    result = pytester.runpytest_inprocess("--circuitfreeze", *entries)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --circuitfreeze-accepted: 'breaks gpt2: one' is named more than once"])
