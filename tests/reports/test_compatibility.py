"""The compatibility matrix: what each architecture is said to be, and how that is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_circuitfreeze.reports import compatibility
from pytest_circuitfreeze.results import Result

PASSED = Result("circuitfreeze/test_a.py::test_x[m]", "x", "X holds.", "m", "e", "passed", 90.0, 5, 0.0, 0.0, "")
SILENT = replace(PASSED, claim="y", sentence="Y holds.", outcome="n/a", message="eager alone", examples=0)
UNBUILT = replace(PASSED, outcome="error", message="Failed: a tiny model of type 'm' cannot be built: timm")
FOUND = {
    "m": [PASSED, SILENT],
    "partly": [replace(PASSED, model="partly", refusals=("layer 0: K is shared", "layer 12: K is shared"))],
    "none": [replace(PASSED, model="none", outcome="refused", message="no attention")],
    "new": [replace(UNBUILT, model="new")],
    "bad": [replace(PASSED, model="bad", outcome="failed", message="z differs", claim=claim) for claim in ("x", "y")],
    "hung": None,
}


@pytest.mark.parametrize(
    ("results", "verdict"),
    [
        (FOUND["m"], "pass"),
        (FOUND["partly"], "pass*"),
        (FOUND["none"], "refused"),
        (FOUND["new"], "not built"),
        ([replace(UNBUILT, outcome="n/a")], "not built"),
        (FOUND["bad"], "FAIL"),
        ([PASSED, replace(PASSED, outcome="skipped")], "FAIL"),
        ([PASSED, replace(PASSED, outcome="error", message="anything else")], "FAIL"),
        ([], "FAIL"),
        (None, "FAIL"),
    ],
)
def test_verdict(results: list[Result] | None, verdict: str) -> None:
    assert compatibility.verdict(results) == verdict


def test_the_matrix_says_what_it_was_made_of_and_why() -> None:
    made = compatibility.document(FOUND, "quick")
    assert json.loads(json.dumps(made)) == made
    lines = compatibility.render(made).splitlines()
    environment = made["environment"]
    assert lines[0].endswith(f"transformers {environment['transformers']}, torch {environment['torch']}")
    assert "- 1 architectures (0 types) pass every claim" in lines
    assert "- 2 architectures (0 types) fail" in lines
    assert "1. X holds." in lines
    assert "| m | \u2713 | n/a | 180 |" in lines
    assert "| partly | \u2713* |  | 90 |" in lines
    assert "| none | \u2717 |  | 90 |" in lines
    assert "- **partly**: pass\\*: layer 0: K is shared" in lines
    assert "- **none**: refused: no attention" in lines
    assert "- **bad**: x, y: z differs" in lines
    assert "- **hung**: the run did not end in time, or died" in lines


def test_named_ones_replace_theirs_and_leave_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def run(names: list[str], profile: str, **_: object) -> dict[str, list[Result] | None]:
        ran.append(list(names))
        return {name: [replace(PASSED, model=name)] for name in names}

    monkeypatch.setattr(compatibility, "run", run)
    monkeypatch.setattr(compatibility, "every_architecture", lambda: ("a", "b", "c"))
    assert compatibility.main([str(tmp_path), "--chunk", "2"]) == 0
    assert ran == [["a", "b"], ["c"]]
    monkeypatch.setitem(FOUND, "b", FOUND["bad"])
    monkeypatch.setattr(compatibility, "run", lambda names, profile: {name: FOUND[name] for name in names})
    assert compatibility.main([str(tmp_path), "b"]) == 1
    (written,) = tmp_path.glob("*.json")
    found = json.loads(written.read_text())["architectures"]
    assert {name: one["verdict"] for name, one in found.items()} == {"a": "pass", "b": "FAIL", "c": "pass"}
    assert written.with_suffix(".md").exists()


def test_one_that_does_not_end_is_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(names: list[str], profile: str) -> dict[str, list[Result] | None]:
        return dict.fromkeys(names, None if "hung" in names else FOUND["m"])

    monkeypatch.setattr(compatibility, "run", run)
    (found,) = compatibility.run_all(["m", "hung"], "quick", 8)
    assert found == {"m": FOUND["m"], "hung": None}
