"""The engines' matrix: a row a claim, a column an engine, and what fails with its example and where it comes from."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pytest_circuitfreeze.reports import engines
from pytest_circuitfreeze.reports.document import Ended, Report
from pytest_circuitfreeze.results import Result

PASSED = Result("circuitfreeze/test_a.py::test_x[m]", "x", "X holds.", "m", "e", "passed", 90.0, 5, 0.0, 0.0, "")
CONFIG = "InterventionConfig(\n    layer_indices=[0],\n    circuit='ov',\n)"
FAILURE = {"arguments": {"model": "M", "engine": "e", "config": CONFIG}}
RESULTS = (
    replace(PASSED, not_offered=("no ste",)),
    replace(PASSED, model="n", outcome="failed", message="v differs by 1", failure=FAILURE),
    replace(
        PASSED,
        id="circuitfreeze/test_a.py::test_y[m]",
        claim="y",
        sentence="Y holds.",
        outcome="not offered",
        not_offered=("no y",),
    ),
)
ENVIRONMENT = {"transformers": "5.1", "torch": "2.3", "hypothesis": "6.1"}
ENDED = Ended(0, True, datetime(2020, 1, 2, tzinfo=UTC), 3.0)
SETTINGS = {"architectures": ["m", "n"], "models": [], "profile": "standard", "seed": 0}


@pytest.fixture
def made() -> dict[str, object]:
    entry = engines.entry("hooks", Report(SETTINGS, ENVIRONMENT, ENDED, RESULTS))
    return json.loads(json.dumps({"engines": {"hooks": entry}}))


def test_the_matrix_says_what_passes_what_fails_and_what_is_not_offered(made: dict[str, object]) -> None:
    lines = [" ".join(line.split()) for line in engines.render(made, {"hooks": {"x": "a hook too few"}}).splitlines()]
    assert "| hooks | - | 5.1 | 2.3 | 6.1 | standard, seed 0 | 15 | 4 |" in lines
    assert "| X holds. | \u25d0 \u2717 |" in lines
    assert "| Y holds. | - |" in lines
    assert "- **x** (n): a hook too few" in lines
    assert "- n: v differs by 1" in lines
    assert "- config: `InterventionConfig( layer_indices=[0], circuit='ov', )`" in lines
    assert "- m not offered (x): no ste" in lines
    assert "- m not offered (y): no y" in lines
    assert not any("engine:" in line for line in lines)


def test_a_failure_that_nobody_looked_into_says_so(made: dict[str, object]) -> None:
    assert "- **x** (n): not looked into" in engines.render(made, {})


def test_a_note_about_what_does_not_fail_is_stale(tmp_path: Path, made: dict[str, object], capsys) -> None:
    (tmp_path / "engines.json").write_text(json.dumps(made))
    (tmp_path / "notes.json").write_text(json.dumps({"hooks": {"x": "why", "y": "why"}}))
    assert engines.main([str(tmp_path), "--render"]) == 1
    assert capsys.readouterr().out == "note about what does not fail: hooks: y\n"
    assert "- **x** (n): why" in (tmp_path / "engines.md").read_text()


def test_named_engines_replace_theirs(tmp_path: Path, made: dict[str, object], monkeypatch) -> None:
    asked = []

    def run(options: list[str], seconds: float) -> Report | None:
        asked.append(options[1])
        return None if options[1] == "freeze_core" else Report(SETTINGS, ENVIRONMENT, ENDED, RESULTS[:1])

    monkeypatch.setattr(engines, "run_suites", run)
    made["engines"]["pyvene"] = made["engines"]["hooks"]
    (tmp_path / "engines.json").write_text(json.dumps(made))
    assert engines.main([str(tmp_path), "hooks", "freeze_core"]) == 1  # the latter did not end
    found = json.loads((tmp_path / "engines.json").read_text())["engines"]
    assert asked == ["hooks", "freeze_core"]
    assert {name: list(one["claims"]) for name, one in found.items()} == {"hooks": ["x"], "pyvene": ["x", "y"]}
