"""The version matrix: each environment's report is kept, compared with the last one, and told in a table."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from documents import EXACT, HOLDS, document

from freeze_core.versions import NEWEST_RUN
from pytest_circuitfreeze import reports
from pytest_circuitfreeze.reports import versions
from pytest_circuitfreeze.results import Result

KEPT = Path(__file__).parents[2] / "docs" / "versions"
RESULTS = (HOLDS, EXACT)
FAILED = replace(HOLDS, outcome="failed", message="v is off by 1 | 2")
SILENT = replace(EXACT, outcome="n/a", message="it has no cache", examples=0)


def environment(python: str = "3.13.0", torch: str = "2.15.0", transformers: str = "5.24.0") -> dict[str, str]:
    return {
        "python": python,
        "torch": torch,
        "transformers": transformers,
        "pytest": "9",
        "hypothesis": "6",
        "numpy": "2",
    }


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Runs the command where the suites have the given results."""

    def command(*arguments: str, results: tuple[Result, ...] | None = RESULTS, **versions_of: str) -> int:
        found = environment(**versions_of)

        def run_suites(options: list[str], seconds: float, keep: Path) -> reports.Report | None:
            ran.append(options)
            if results is None:
                return None
            made = document(results)
            made["environment"] |= found
            keep.write_text(json.dumps(made))
            return reports.read(keep)

        monkeypatch.setattr(versions, "run_suites", run_suites)
        monkeypatch.setattr(versions, "environment", lambda: found)
        return versions.main([str(tmp_path), *arguments])

    ran: list[list[str]] = []
    command.ran = ran  # type: ignore[attr-defined]
    return command


def rows(folder: Path) -> list[list[str]]:
    """The table's cells, without its head."""
    lines = [line for line in (folder / "versions.md").read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_environments_are_lines_and_the_newest_is_last(run: Callable[..., int], tmp_path: Path) -> None:
    assert run() == 0
    assert run(python="3.12.1", torch="2.6.0+cu124", transformers="5.9.0") == 0
    assert run(python="3.11.7", torch="2.13.0+cpu") == 0
    assert [row[1:4] for row in rows(tmp_path)] == [
        ["3.12.1", "2.6.0+cu124", "5.9.0"],
        ["3.11.7", "2.13.0+cpu", "5.24.0"],
        ["3.13.0", "2.15.0", "5.24.0"],
    ]
    assert rows(tmp_path)[0][0] == "2020-01-02"
    assert rows(tmp_path)[0][-2:] == ["1 pass", "1 pass"]
    assert sorted(path.name for path in tmp_path.glob("*.json")) == [
        "python-3.11-torch-2.13.0-transformers-5.24.0.json",
        "python-3.12-torch-2.6.0-transformers-5.9.0.json",
        "python-3.13-torch-2.15.0-transformers-5.24.0.json",
    ]


def test_second_run_of_an_environment_replaces_the_first(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(transformers="5.25.0")
    run(results=(FAILED, SILENT))
    capsys.readouterr()
    assert run(python="3.13.9", torch="2.15.0+cpu") == 0
    assert [row[1] for row in rows(tmp_path)] == ["3.13.9", "3.13.0"]
    printed = capsys.readouterr().out
    assert "# Compared with python-3.13-torch-2.15.0-transformers-5.24.0.json" in printed
    assert re.search(r"values agree *\| gpt2 *\| FAIL *\| pass", printed)


def test_new_environment_is_compared_with_the_newest(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(transformers="5.9.0") == 0
    assert "Compared" not in capsys.readouterr().out
    assert run(transformers="5.24.0") == 0
    assert run(transformers="5.25.0.dev0", results=(FAILED, EXACT)) == 1
    printed = capsys.readouterr().out
    assert "# Compared with python-3.13-torch-2.15.0-transformers-5.24.0.json" in printed
    assert "## Worse" in printed


def test_claims_that_did_not_pass_are_named_with_their_reason(run: Callable[..., int], tmp_path: Path) -> None:
    assert run(results=(FAILED, SILENT, replace(SILENT, model="gpt2", claim="others"))) == 1
    text = (tmp_path / "versions.md").read_text()
    assert rows(tmp_path)[0][-2:] == ["1 FAIL, 1 n/a", "1 n/a"]
    assert "## Did not pass: python 3.13.0, torch 2.15.0, transformers 5.24.0" in text
    assert "- FAIL, **values agree** (gpt2): v is off by 1 \\| 2" in text
    assert "- n/a, **values agree** (llama): it has no cache" in text
    assert "- n/a, **others** (gpt2): it has no cache" in text


def test_run_that_dies_fails_and_changes_nothing(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert run(results=None) == 1
    assert "no report was kept" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_table_is_written_again_without_a_run(run: Callable[..., int], tmp_path: Path) -> None:
    run()
    (tmp_path / "versions.md").unlink()
    count = len(run.ran)  # type: ignore[attr-defined]
    assert run("--render") == 0
    assert len(run.ran) == count  # type: ignore[attr-defined]
    assert len(rows(tmp_path)) == 1


def test_main_job_is_run_unless_told_otherwise(run: Callable[..., int]) -> None:
    run()
    run("gpt2", "llama", "--profile", "quick")
    assert run.ran == [  # type: ignore[attr-defined]
        ["--circuitfreeze-profile", "standard"],
        ["--circuitfreeze-profile", "quick", "--circuitfreeze-arch", "gpt2,llama"],
    ]


def test_file_is_named_by_the_versions_of_this_environment() -> None:
    found = versions.environment()
    assert found.keys() >= {*versions.AXES, "pytest", "hypothesis", "numpy"}
    assert re.fullmatch(r"python-3\.\d+-torch-[\d.]+-transformers-[\w.]+\.json", versions.file_name(found))


def test_kept_table_is_made_of_the_kept_reports() -> None:
    kept = versions.read_all(KEPT)
    assert (KEPT / "versions.md").read_text(encoding="utf-8") == versions.render(list(kept.values()))
    for name, report in kept.items():
        assert name == versions.file_name(report.environment)
        assert report.ended.complete


def test_errors_name_what_is_newer_than_the_newest_kept_report() -> None:
    newest = list(versions.read_all(KEPT).values())[-1].environment
    assert {library: newest[library].partition("+")[0] for library in NEWEST_RUN} == NEWEST_RUN
