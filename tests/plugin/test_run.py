"""A run from start to end: exit status, table, JUnit, report, distributed or not."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent
from xml.etree import ElementTree

import pytest
from tables import table

Run = Callable[..., pytest.RunResult]
ON = ("--circuitfreeze", "--circuitfreeze-arch", "gpt2,falcon_mqa", "circuitfreeze")
BREAKS = """
    def test_breaks(circuit_model):
        '''A claim that one model breaks.'''
        assert circuit_model == "gpt2", "another model"
"""
WORKERS = pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["one process", "two workers"])


@WORKERS
def test_all_hold(stand_in: Run, workers: tuple[str, ...]) -> None:
    result = stand_in(*ON, *workers)
    assert result.ret == 0
    result.assert_outcomes(passed=6)
    result.stdout.fnmatch_lines(
        ["circuitfreeze: *, engine idle:Engine on gpt2, falcon_mqa; profile standard, seed 0; cpu; torch*"]
    )
    # Workers end in any order; the table is the same.
    assert [line.rstrip() for line in table(result)] == [
        "                                        of",
        "                   gpt2  falcon_mqa  bound",
        "alpha",
        "  second by name   pass        pass  exact",
        "  a property       pass        pass    25%",
        "beta",
        "  something else   pass        pass      -",
        "",
        "3 claims on 2 models: 6 passed; 52 examples",
        "closest to its bound: a property, falcon_mqa, 25% of it",
    ]


@WORKERS
def test_broken_claim_fails_the_run_and_stands_out(stand_in: Run, workers: tuple[str, ...]) -> None:
    result = stand_in(*ON, *workers, test_gamma=BREAKS)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert "  breaks           pass        FAIL      -" in table(result)
    assert "4 claims on 2 models: 1 failed, 7 passed; 52 examples" in table(result)


def test_error_in_a_fixture_is_no_pass(stand_in: Run) -> None:
    broken = """
        import pytest

        @pytest.fixture
        def broken():
            raise RuntimeError("no set-up today")

        @pytest.fixture
        def late():
            yield
            raise RuntimeError("no tear-down today")

        def test_needs_broken(circuit_model, broken): pass
        def test_needs_late(circuit_model, late): pass
    """
    result = stand_in(*ON, "-k", "gamma", test_gamma=broken)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    shown = table(result)
    assert "  needs broken  ERROR       ERROR      -" in shown
    assert "  needs late    ERROR       ERROR      -" in shown
    assert "ERROR RuntimeError: no set-up today" in shown
    assert "2 claims on 2 models: 4 error; 0 examples" in shown


def test_margin_beyond_its_bound_is_refused(stand_in: Run) -> None:
    careless = """
        from types import SimpleNamespace

        import pytest

        @pytest.mark.parametrize(("error", "bound"), [(2.0, 1.0), (1e-9, 0.0), (float("nan"), 1.0), (-1.0, 1.0)])
        def test_careless(circuit_model, circuit_record, error, bound):
            circuit_record.observe(SimpleNamespace(error=error, bound=bound))
    """
    result = stand_in(*ON, "-k", "careless and gpt2", test_gamma=careless)
    result.assert_outcomes(failed=4, deselected=10)
    result.stdout.fnmatch_lines(["*a check passed an error of nan where the bound is 1.0*"])


def test_projects_own_tests_are_not_in_the_table(stand_in: Run) -> None:
    Path("test_mine.py").write_text("def test_mine(circuit_model): pass")
    result = stand_in(*ON[:-1])
    result.assert_outcomes(passed=8)
    assert "3 claims on 2 models: 6 passed; 52 examples" in table(result)


def test_narrow_terminal_folds_names(stand_in: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    names = "gpt2,llama,mistral_gqa,falcon_mqa"
    result = stand_in("--circuitfreeze", "--circuitfreeze-arch", names, "circuitfreeze")
    shown = table(result)
    assert shown[0].split() == ["mistral_", "falcon_", "of"]
    assert shown[1].split() == ["gpt2", "llama", "gqa", "mqa", "bound"]
    assert max(map(len, shown[:-2])) <= 60


def test_too_many_models_for_a_line_start_a_new_block(stand_in: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    names = "gpt2,opt,llama,llama_gqa,mistral_gqa,phi3,falcon_mqa,falcon_mha,falcon_gqa"
    result = stand_in("--circuitfreeze", "--circuitfreeze-arch", names, "circuitfreeze")
    shown = table(result)
    assert shown.count("alpha") > 1
    rows = [line for line in shown if line.startswith("  a property")]
    assert sum(row.count("pass") for row in rows) == 9
    assert max(map(len, shown[:-2])) <= 60


@WORKERS
def test_junit_carries_the_findings(stand_in: Run, workers: tuple[str, ...]) -> None:
    stand_in(*ON, "--junitxml=junit.xml", *workers)
    cases = {case.get("name"): case for case in ElementTree.parse("junit.xml").iter("testcase")}
    case = cases["test_a_property[gpt2]"]
    assert case.get("classname") == "circuitfreeze.test_alpha"
    assert {entry.get("name"): entry.get("value") for entry in case.iter("property")} == {
        "circuitfreeze.claim": "a_property",
        "circuitfreeze.sentence": "A claim that holds within a bound.",
        "circuitfreeze.model": "gpt2",
        "circuitfreeze.engine": "idle:Engine",
        "circuitfreeze.examples": "25",
        "circuitfreeze.error": "0.25",
        "circuitfreeze.bound": "1.0",
    }


@WORKERS
def test_report_is_written(stand_in: Run, workers: tuple[str, ...]) -> None:
    result = stand_in(*ON, "--circuitfreeze-report", "out/deep", *workers, test_gamma=BREAKS)
    result.stdout.fnmatch_lines(["report: out/deep/report.json", "report: out/deep/report.md"])
    # Not by importing it: pytester forgets what a test has imported, and its extensions load but once.
    plots = {"bounds.svg", "bounds.png"} if find_spec("matplotlib") else set()
    faces = {"report.json", "report.md", "report.html", "claims.tex"} | plots
    assert {path.name for path in Path("out/deep").iterdir()} == faces
    told = {Path(line.removeprefix("report: ")).name for line in result.stdout.lines if line.startswith("report: out")}
    assert told == faces
    document = json.loads(Path("out/deep/report.json").read_text())
    assert document["exit_status"] == 1
    outcomes = [(entry["claim"], entry["model"], entry["outcome"]) for entry in document["results"]]
    assert outcomes == [
        (claim, model, "failed" if (claim, model) == ("breaks", "falcon_mqa") else "passed")
        for claim in ("second_by_name", "a_property", "something_else", "breaks")
        for model in ("falcon_mqa", "gpt2")
    ]
    assert (
        "| A claim that one model breaks. | pass   | FAIL          | -          |"
        in Path("out/deep/report.md").read_text()
    )


@pytest.mark.parametrize(
    ("options", "tests", "status"),
    [
        ((), "raise KeyboardInterrupt", pytest.ExitCode.INTERRUPTED),
        (("--maxfail=1",), "assert False", pytest.ExitCode.TESTS_FAILED),
    ],
)
def test_run_that_is_stopped_leaves_a_report_that_says_so(
    stand_in: Run, options: tuple[str, ...], tests: str, status: int
) -> None:
    stops = f"""
        def test_stops(circuit_model):
            '''A claim after which nothing runs.'''
            {tests}
    """
    result = stand_in(*ON, "--circuitfreeze-report=out", *options, test_aardvark=stops)
    assert result.ret == status
    document = json.loads(Path("out/report.json").read_text())
    assert not document["complete"]
    assert len(document["results"]) < 8
    assert "stopped before its end" in Path("out/report.html").read_text()


def test_run_that_is_killed_leaves_the_former_report(stand_in: Run) -> None:
    stand_in(*ON, "--circuitfreeze-report=out")
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    dies = """
        import os
        import signal

        def test_dies(circuit_model):
            '''A claim in the middle of which the process ends.'''
            os.kill(os.getpid(), signal.SIGKILL)
    """
    result = stand_in(*ON, "--circuitfreeze-report=out", test_beta=dies)
    assert result.ret == -signal.SIGKILL
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before


def test_worker_that_dies_is_an_error_that_is_told(stand_in: Run) -> None:
    dies = """
        import os
        import pytest

        @pytest.fixture
        def memory():
            os._exit(9)

        def test_dies_in_its_set_up(circuit_model, memory):
            '''A claim that is never tried.'''
    """
    result = stand_in(*ON, "--circuitfreeze-report=out", "-n", "1", "--max-worker-restart=4", test_gamma=dies)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    document = json.loads(Path("out/report.json").read_text())
    assert not document["complete"]
    lost = [entry for entry in document["results"] if entry["claim"] == "dies_in_its_set_up"]
    assert [(entry["model"], entry["outcome"]) for entry in lost] == [("falcon_mqa", "error"), ("gpt2", "error")]
    assert ["crashed while running" in entry["message"] for entry in lost] == [True, True], lost


def test_claims_that_cannot_be_collected_are_missing(stand_in: Run) -> None:
    broken = "raise RuntimeError('no such file')"
    stand_in(*ON, "--circuitfreeze-report=out", "--continue-on-collection-errors", test_gamma=broken)
    assert not json.loads(Path("out/report.json").read_text())["complete"]


def test_run_that_is_left_early_is_not_complete(stand_in: Run) -> None:
    leaves = """
        import pytest

        def test_leaves(circuit_model):
            '''A claim after which the run is left.'''
            pytest.exit("enough", returncode=1)
    """
    stand_in(*ON, "--circuitfreeze-report=out", test_aardvark=leaves)
    assert not json.loads(Path("out/report.json").read_text())["complete"]


@pytest.mark.parametrize("options", [("--collect-only",), ("-k", "nothing_is_called_so")])
def test_run_of_nothing_leaves_the_former_report(stand_in: Run, options: tuple[str, ...]) -> None:
    stand_in(*ON, "--circuitfreeze-report=out")
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    stand_in(*ON, "--circuitfreeze-report=out", *options)
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before


def test_folder_that_cannot_be_made_is_told_before_the_run(stand_in: Run) -> None:
    Path("out").write_text("a file where the folder should be")
    result = stand_in(*ON, "--circuitfreeze-report", "out/deep")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --circuitfreeze-report: 'out/deep' cannot be made: Not a directory"])


def test_report_that_cannot_be_written_fails_the_run(stand_in: Run) -> None:
    takes = """
        from pathlib import Path

        def test_takes_the_folder(circuit_model):
            '''A claim that puts a folder where the report should be.'''
            Path("out/report.json").mkdir(exist_ok=True)
    """
    result = stand_in(*ON, "--circuitfreeze-report", "out", test_gamma=takes)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["ERROR the report cannot be written: IsADirectoryError*"])


def test_nothing_is_left_in_the_folder(stand_in: Run) -> None:
    # Hypothesis's plugin and pytest-benchmark's make folders of their own in any run.
    stand_in(*ON, "-p", "no:cacheprovider", "-p", "no:benchmark")
    assert [path.name for path in Path().iterdir() if path.name != ".hypothesis"] == []


def test_thorough_profile_draws_a_seed_and_shares_it(stand_in: Run) -> None:
    seeds = """
        def test_seed(request, record_property, circuit_model):
            record_property("seed", request.config.pluginmanager.get_plugin("circuitfreeze-collection")._seed)
    """
    result = stand_in(
        *ON, "-n", "2", "-v", "--circuitfreeze-profile=thorough", "--junitxml=x.xml", "-k", "seed", test_gamma=seeds
    )
    shown = result.stdout.str().partition("profile thorough, seed ")[2].partition(";")[0]
    assert int(shown) > 0
    found = [entry.get("value") for entry in ElementTree.parse("x.xml").iter("property") if entry.get("name") == "seed"]
    assert found == [shown, shown]


def test_tiny_models_take_one_thread_and_give_the_others_back(stand_in: Run) -> None:
    # A model of the user's runs after the tiny one, with the threads that were there before.
    threads = """
        import torch

        def test_threads(circuit_model):
            assert torch.get_num_threads() == (1 if circuit_model == "gpt2" else 3)
    """
    Path("conftest.py").write_text("import torch\ntorch.set_num_threads(3)")
    result = stand_in(
        *ON, "--circuitfreeze-arch=gpt2", "--circuitfreeze-model=mine", "-k", "threads", test_gamma=threads
    )
    result.assert_outcomes(passed=2, deselected=6)


RERUNS = """
    from _pytest.runner import runtestprotocol

    # What pytest-rerunfailures does under --reruns 1.
    def pytest_runtest_protocol(item, nextitem):
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for again in (True, False):
            reports = runtestprotocol(item, nextitem=nextitem, log=False)
            again = again and any(report.failed for report in reports)
            for report in reports:
                if again and report.failed:
                    report.outcome = "rerun"
                item.ihook.pytest_runtest_logreport(report=report)
                if report.outcome == "rerun":
                    break
            if not again:
                break
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_report_teststatus(report):
        return ("rerun", "R", "RERUN") if report.outcome == "rerun" else None
"""

FAILS_FIRST = """
    from types import SimpleNamespace

    from pytest_circuitfreeze.suites.claims import Claim

    runs = []

    def test_fails_first(circuit_model, circuit_record):
        '''A claim that fails the first time.'''
        runs.append(circuit_model)
        circuit_record.observe(SimpleNamespace(error=0.25, bound=1.0))
        Claim("numbers are small").demand(len(runs) > 1, "it is not")
"""


def test_a_test_that_is_run_again_has_the_results_of_its_last_run(stand_in: Run) -> None:
    Path("conftest.py").write_text(dedent(RERUNS))
    result = stand_in(
        *ON, "--circuitfreeze-arch=gpt2", "--circuitfreeze-report=out", "--junitxml=x.xml", "-k", "fails_first",
        test_gamma=FAILS_FIRST,
    )  # fmt: skip
    assert result.ret == 0
    (found,) = json.loads(Path("out/report.json").read_text())["results"]
    assert (found["outcome"], found["failure"], found["message"], found["examples"]) == ("passed", None, "", 1)
    (case,) = ElementTree.parse("x.xml").iter("testcase")
    names = [entry.get("name") for entry in case.iter("property")]
    assert "circuitfreeze.claim" in names
    assert sorted(names) == sorted(set(names))
    assert not [name for name in names if name.startswith("circuitfreeze.failure")]


@pytest.mark.parametrize("option", ["--setup-only", "--setup-plan"])
def test_set_up_alone_finds_nothing(stand_in: Run, option: str) -> None:
    stand_in(*ON, "--circuitfreeze-report=out")
    before = Path("out/report.json").read_bytes()
    result = stand_in(*ON, "--circuitfreeze-report=out", option)
    assert result.ret == 0
    assert "ERROR" not in result.stdout.str()
    assert Path("out/report.json").read_bytes() == before
