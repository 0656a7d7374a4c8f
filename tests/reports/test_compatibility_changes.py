"""What changed from one release of transformers to another, as the two compatibility matrices say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pytest_circuitfreeze.reports import compatibility_changes


def entry(verdict: str, *reasons: str, **claims: str) -> dict[str, Any]:
    return {"type": True, "verdict": verdict, "reasons": list(reasons), "claims": claims}


def matrix(release: str, **architectures: dict[str, Any]) -> dict[str, Any]:
    environment = {"transformers": release, "torch": "2.13.0"}
    return {"environment": environment, "claims": {"x": "X holds."}, "architectures": architectures}


BEFORE = matrix(
    "5.23.0",
    same=entry("pass", x="pass"),
    breaks=entry("pass", x="pass"),
    mends=entry("FAIL", "x: z differs", x="FAIL"),
    falls_silent=entry("pass", x="pass"),
    leaves=entry("pass", x="pass"),
    built=entry("not built", "needs timm"),
)
AFTER = matrix(
    "5.24.0",
    same=entry("pass", x="pass", y="pass"),
    breaks=entry("refused", "no projections", x="refused"),
    mends=entry("pass*", "K of some heads", x="pass*"),
    falls_silent=entry("pass", x="n/a"),
    comes=entry("pass", x="pass"),
    built=entry("refused", "no attention"),
)


def test_each_change_stands_in_one_group() -> None:
    assert compatibility_changes.changes(BEFORE, AFTER) == {
        "broken": ["**breaks** is refused (no projections); before it passes every claim"],
        "mended": [
            (
                "**mends** passes every claim, except for configs that are refused by name (K of some heads); before "
                "it fails (x: z differs)"
            )
        ],
        "other": ["**built** is refused (no attention); before it has no tiny model (needs timm)"],
        "new": ["**comes** passes every claim"],
        "gone": ["**leaves**, which passes every claim"],
        "claims": ["**falls_silent**: x: pass, now n/a"],
    }


def test_a_matrix_beside_itself_has_no_changes() -> None:
    assert not any(compatibility_changes.changes(AFTER, AFTER).values())


def test_the_table_counts_types_by_verdict() -> None:
    lines = compatibility_changes.render(BEFORE, AFTER).splitlines()
    assert "| before | 5.23.0 | 2.13.0 | 1 | 6 | 4 | 0 | 1 | 1 |" in lines
    assert "| after | 5.24.0 | 2.13.0 | 1 | 6 | 4 | 2 | 0 | 0 |" in lines
    assert r"- **falls\_silent**: x: pass, now n/a" in lines


@pytest.mark.parametrize(("after", "status"), [(AFTER, 1), (BEFORE, 0)])
def test_the_command_fails_where_support_was_lost(tmp_path: Path, after: dict[str, Any], status: int) -> None:
    for release, made in (("5.23", BEFORE), ("5.24", after)):
        (tmp_path / f"compatibility-transformers-{release}.json").write_text(json.dumps(made))
    assert compatibility_changes.main([str(tmp_path), "5.23", "5.24"]) == status
    assert (tmp_path / "changes-5.23-5.24.md").read_text().startswith("# What changed from transformers 5.23.0 to")
