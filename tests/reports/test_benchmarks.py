"""The benchmarks' report: what is kept and shown of a run, and what of it reaches its target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pytest_circuitfreeze.reports import benchmarks

SPREAD = {"median": 1.25, "low": 1.2, "high": 1.3, "n": 20}


def one(**other: Any) -> dict[str, Any]:
    return {
        "file": "bench_forward.py",
        "name": "bench_forward[tiny-qk]",
        "group": "forward",
        "environment": {"CPU": "Some CPU", "cores": "2", "torch": "2.13"},
        "row": "tiny, qk",
        "engine": "e",
        "ratios": {"plain": {**SPREAD, "median": 1.0, "low": 0.9}, "e": SPREAD},
        "target": 1.1,
        "missing": {"pyvene": "not\ninstalled"},
    } | other


def lines(*made: dict[str, Any], notes: dict[str, str] | None = None) -> list[str]:
    return [" ".join(line.split()) for line in benchmarks.render(made, notes or {}).splitlines()]


def test_a_ratio_stands_with_its_spread_beside_its_target() -> None:
    shown = lines(one())
    assert "| tiny, qk | 1.000 [0.900, 1.300] n=20 | 1.250 [1.200, 1.300] n=20 | 1.1 | not reached |" in shown
    assert "- CPU Some CPU, cores 2, torch 2.13" in shown
    assert "- pyvene, not measured: not installed" in shown


def test_what_is_not_reached_says_what_bounds_it() -> None:
    assert "- tiny, qk, not reached: not looked into" in lines(one())
    assert "- tiny, qk, not reached: the clock" in lines(one(), notes={"bench_forward[tiny-qk]": "the clock"})
    assert not any("not reached" in line for line in lines(one(target=1.25)))


def test_a_file_that_runs_again_replaces_its_own() -> None:
    kept, old, new = one(file="bench_growth.py"), one(), one(row="anew")
    assert benchmarks.merged([kept, old], [new]) == [new, kept]


def test_a_note_about_what_is_reached_is_stale(tmp_path: Path) -> None:
    (tmp_path / "benchmarks.json").write_text(json.dumps([one(target=2)]))
    (tmp_path / "notes.json").write_text(json.dumps({"bench_forward[tiny-qk]": "why"}))
    assert benchmarks.main([str(tmp_path), "--render"]) == 1
    (tmp_path / "notes.json").write_text("{}")
    assert benchmarks.main([str(tmp_path), "--render"]) == 0


def test_benchmarks_that_are_not_there_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmarks.main([str(tmp_path), "bench_nothing.py"])
    assert "bench_nothing.py: no such benchmarks; choose from bench_cached_step.py" in capsys.readouterr().err


def test_benchmarks_run_and_name_no_machine() -> None:
    found = benchmarks.run(["bench_compiled.py"])
    assert [each["row"] for each in found][:2] == ["the same again", "other heads"]
    assert {each["file"] for each in found} == {"bench_compiled.py"}
    assert {"CPU", "cores", "torch"} <= found[0]["environment"].keys()
    assert "machine_info" not in json.dumps(found)
