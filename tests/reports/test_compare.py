"""Two runs compared: equal ones differ in nothing, and a planted difference is all that shows."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles

import pytest
from documents import ALL, BREAKS, EVIL, EXACT, HOLDS, benchmark, document

from pytest_circuitfreeze import reports
from pytest_circuitfreeze.reports.__main__ import main
from pytest_circuitfreeze.reports.compare import compare, render
from pytest_circuitfreeze.results import Result

ROUNDS = 30


def measured(row: str, cost: float, noise: float, draw: random.Random) -> Result:
    """A benchmark whose rounds are drawn: each round's noise, and some that the whole run shares."""
    made = benchmark(row, cost)
    assert made.benchmark is not None
    ratios = {}
    for name, value in (("plain", 1.0), ("freeze_core", cost)):
        shared = draw.gauss(0, noise / 4)
        values = [value * (1 + shared + draw.gauss(0, noise)) for _ in range(ROUNDS)]
        low, _, high = quantiles(values, n=4)
        ratios[name] = {"median": median(values), "low": low, "high": high, "n": ROUNDS}
    return replace(made, benchmark={**made.benchmark, "ratios": ratios})


def run(seed: int, *, slower: float = 1.0, noise: float = 0.02) -> reports.Report:
    """A run of two models, of whose benchmarks one may cost more."""
    draw = random.Random(seed)
    costs = {"gpt2, one head": 1.05 * slower, "gpt2, all heads": 1.2, "llama, one head": 1.04}
    return reports.parse(document((HOLDS, EXACT, *(measured(row, cost, noise, draw) for row, cost in costs.items()))))


def test_equal_runs_differ_in_nothing() -> None:
    for pair in range(200):
        found = compare(run(2 * pair), run(2 * pair + 1))
        assert render(found) == "", f"pair {pair}"
        assert not found.worse


def test_slower_freeze_is_all_that_shows() -> None:
    for pair in range(50):
        found = compare(run(2 * pair), run(2 * pair + 1, slower=1.25))
        assert [one.name for one in found.costs] == ["frozen forward: gpt2, one head"], f"pair {pair}"
        assert found.worse
        assert not found.claims
        assert not found.conditions


def test_faster_freeze_is_told_and_is_not_worse() -> None:
    found = compare(run(0, slower=1.25), run(1))
    assert [one.ratio < 1 for one in found.costs] == [True]
    assert not found.worse


def test_difference_within_the_noise_is_none() -> None:
    assert compare(run(0, noise=0.2), run(1, slower=1.2, noise=0.2)).costs == []


def test_failing_claim_is_all_that_shows() -> None:
    old, new = document((HOLDS, EXACT)), document((HOLDS, replace(EXACT, outcome="failed", message="v is off")))
    found = compare(reports.parse(old), reports.parse(new))
    assert [(one.claim, one.model, one.old, one.new) for one in found.claims] == [
        ("values_agree", "llama", "pass", "FAIL")
    ]
    assert found.worse
    assert render(found).splitlines() == [
        "## Worse",
        "",
        "| claim        | model   | old   | new   |",
        "|--------------|---------|-------|-------|",
        "| values agree | llama   | pass  | FAIL  |",
        "",
        "- values\\_agree, llama: v is off",
    ]
    assert not compare(reports.parse(new), reports.parse(old)).worse


def test_other_versions_and_missing_models_are_told_and_are_not_worse() -> None:
    old, new = document((HOLDS, EXACT)), document((HOLDS,), architectures=("gpt2",))
    new["environment"]["transformers"] = "5.2"
    found = compare(reports.parse(old), reports.parse(new))
    assert ("transformers", "5.1", "5.2") in found.conditions
    assert [(one.model, one.old, one.new) for one in found.claims] == [("llama", "pass", "-")]
    assert not found.worse


def test_names_are_text() -> None:
    found = compare(reports.parse(document((HOLDS,))), reports.parse(document(ALL)))
    text = render(found)
    assert EVIL not in text
    assert "\\<script>" in text


def test_command_says_which_run_is_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, results in (("old", (HOLDS, EXACT)), ("new", (HOLDS, EXACT, BREAKS))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(document(results)))
    assert main(["compare", str(tmp_path / "old"), str(tmp_path / "old" / "report.json")]) == 0
    assert capsys.readouterr().out == "nothing differs beyond the noise\n"
    assert main(["compare", str(tmp_path / "old"), str(tmp_path / "new")]) == 1
    assert "## Worse" in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "old"), str(tmp_path / "none.json")]) == 2
    assert capsys.readouterr().err.endswith("none.json cannot be read: No such file or directory\n")


def test_benchmark_that_fails_or_is_gone_is_told() -> None:
    held = benchmark("gpt2, one head", 1.04)
    old = reports.parse(document((HOLDS, held)))
    for outcome in ("failed", "error"):
        found = compare(old, reports.parse(document((HOLDS, replace(held, outcome=outcome, message="too slow")))))
        assert found.worse
        assert [(one.old, one.message) for one in found.claims] == [("pass", "too slow")]
    gone = compare(old, reports.parse(document((HOLDS,))))
    assert [(one.old, one.new) for one in gone.claims] == [("pass", "-")]
    assert not gone.worse


def test_claims_of_one_name_in_two_files_are_two() -> None:
    mine = replace(HOLDS, id="tests/test_mine.py::test_values_agree[gpt2]")
    old = reports.parse(document((mine, HOLDS)))
    new = reports.parse(document((replace(mine, outcome="failed", message="off"), HOLDS)))
    assert compare(old, new).worse


def test_claim_that_was_skipped_and_fails_now_is_worse() -> None:
    old = reports.parse(document((replace(HOLDS, outcome="skipped"),)))
    assert compare(old, reports.parse(document((replace(HOLDS, outcome="failed"),)))).worse
