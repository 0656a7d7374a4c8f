"""In a job of GitHub: what failed is annotated, the report is the job's summary; elsewhere there is nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_circuitfreeze import github
from pytest_circuitfreeze.results import Result

Run = Callable[..., pytest.RunResult]
ON = ("--circuitfreeze", "circuitfreeze")
BREAKS = """
    def test_breaks(circuit_model):
        '''A claim that does not hold.'''
        raise AssertionError("100% off: a, b\\nand more")
"""
FAILED = Result("circuitfreeze/test_a.py::test_x[m,n]", "x", "X holds.", "m", "e", "failed", 0.1, 5, 0.0, 0.0, "off")


def test_job_has_a_summary_and_annotations(stand_in: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("from an earlier step\n")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    for workers in ((), ("-n", "2")):
        result = stand_in(*ON, "--circuitfreeze-arch=gpt2", *workers, test_gamma=BREAKS)
        assert result.ret == pytest.ExitCode.TESTS_FAILED
        shown = [line for line in result.stdout.lines if line.startswith("::")]
        assert shown == [
            "::error title=circuitfreeze/test_gamma.py%3A%3Atest_breaks[gpt2]::AssertionError: 100%25 off: a, b"
        ]
    text = summary.read_text()
    assert text.startswith("from an earlier step\n# circuitfreeze: idle:Engine\n")
    assert text.count("| A claim that does not hold. | FAIL") == 2
    assert not list(Path.cwd().glob("report*"))


def test_elsewhere_there_is_nothing(stand_in: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)
    result = stand_in(*ON, test_gamma=BREAKS)
    assert not [line for line in result.stdout.lines if line.startswith("::")]


def test_commands_end_where_they_should() -> None:
    (line,) = github.workflow_commands([replace(FAILED, message="a\r\nb%")], {"GITHUB_ACTIONS": "true"})
    assert line == "::error title=circuitfreeze/test_a.py%3A%3Atest_x[m%2Cn]::a%0D%0Ab%25"


def test_only_as_many_annotations_as_are_shown() -> None:
    assert len(github.workflow_commands([FAILED] * 25, {"GITHUB_ACTIONS": "true"})) == github.MOST


def test_summary_that_is_too_large_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "summary.md"
    github.add_summary("é" * github.LARGEST, {"GITHUB_STEP_SUMMARY": str(path)})
    content = path.read_bytes()
    assert github.LARGEST - 2 <= len(content) <= github.LARGEST
    assert content.decode().endswith("The report itself has all.\n")


def test_summary_shares_its_room_with_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "summary.md"
    for _ in range(3):
        github.add_summary("x" * (github.LARGEST - 1000), {"GITHUB_STEP_SUMMARY": str(path)})
    assert path.stat().st_size <= github.LARGEST
    assert path.read_text().count("The report itself has all.") == 1


def test_summary_that_cannot_be_written_fails_the_run(stand_in: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "/nowhere/at/all")
    result = stand_in(*ON, "--circuitfreeze-report=out")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["report: out/report.json", "ERROR the report cannot be written: *nowhere*"])
    assert Path("out/report.html").exists()
