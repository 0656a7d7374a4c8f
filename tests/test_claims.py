"""The table of claims holds together: no claim without a check, no check that is not there, no property unclaimed."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "claims" / "claims.md"
ROW = re.compile(r"^\| (?P<number>[\w.]+) \| (?P<claim>.+?) \| ?(?P<checks>.*?) ?\|$")


def claims(table: str) -> dict[str, list[str]]:
    """The tests that each claim of a table names, by the claim's number.

    Raises:
        AssertionError: a line of the table is no claim, or a number is given twice.
    """
    found: dict[str, list[str]] = {}
    for line in table.splitlines():
        if not line.startswith("|") or line in ("| | claim | checked by |", "| --- | --- | --- |"):
            continue
        row = ROW.match(line)
        assert row, f"no row of three cells: {line}"
        assert row["number"] not in found, f"two claims are numbered {row['number']}"
        found[row["number"]] = re.findall(r"`([^`]+)`", row["checks"])
    return found


def names_in(*patterns: str) -> set[str]:
    """The tests in files that match, as `<path>::<name>`."""
    return {
        f"{path.relative_to(ROOT).as_posix()}::{node.name}"
        for pattern in patterns
        for path in ROOT.glob(pattern)
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def faults(table: str) -> list[str]:
    """What is wrong with a table of claims, in words."""
    named = claims(table)
    properties = names_in("suites/test_*.py")
    there = properties | names_in("tests/**/test_*.py")
    found = [f"claim {number} names no check" for number, checks in named.items() if not checks]
    found += [f"claim {at}: there is no {one}" for at, checks in named.items() for one in checks if one not in there]
    all_named = {one for checks in named.values() for one in checks}
    return found + [f"no claim names {one}" for one in sorted(properties - all_named)]


def test_every_claim_has_a_check_and_every_property_a_claim() -> None:
    table = TABLE.read_text(encoding="utf-8")
    assert len(claims(table)) > 100
    assert faults(table) == []


def test_faults_are_found() -> None:
    table = TABLE.read_text(encoding="utf-8")
    own = "suites/test_storage.py::test_storage_does_not_matter"
    assert faults(table.replace(f"`{own}`", "")) == ["claim 6.1 names no check", f"no claim names {own}"]
    assert faults(table.replace(own, f"{own}_much")) == [
        f"claim 6.1: there is no {own}_much",
        f"no claim names {own}",
    ]
