"""Claims by models: what a cell says, and which rows and columns there are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pytest_circuitfreeze import matrix
from pytest_circuitfreeze.results import Result

PASSED = Result("circuitfreeze/test_a.py::test_x[m]", "x", "X holds.", "m", "e", "passed", 0.1, 5, 0.0, 0.0, "")


@pytest.mark.parametrize(
    ("outcomes", "word"),
    [
        (["passed"], "pass"),
        (["passed", "skipped"], "skip"),
        (["skipped", "error", "passed"], "ERROR"),
        (["passed", "failed", "error"], "FAIL"),
        (["passed", "n/a"], "pass"),
        (["n/a"], "n/a"),
        (["refused"], "refused"),
        (["not offered", "n/a"], "not offered"),
        (["passed", "not offered"], "in part"),
        ([], "-"),
    ],
)
def test_cell_of_several_tests_says_the_worst(outcomes: list[str], word: str) -> None:
    others = [replace(PASSED, model="other")]
    why = {"not offered": ("no time",)}
    results = others + [replace(PASSED, outcome=one, not_offered=why.get(one, ())) for one in outcomes]
    (row,) = matrix.rows(results, ["other", "m"])
    assert row.cells == ("pass", word)


@pytest.mark.parametrize(
    ("margins", "shown"),
    [
        ([(0.0, 0.0)], "exact"),
        ([(0.0, 0.0), (0.0, 1.0)], "0%"),
        ([(0.001, 1.0)], "<1%"),
        ([(0.5, 1.0), (0.3, 0.4)], "75%"),
        ([], "-"),
    ],
)
def test_closest_is_the_largest_share_of_a_bound(margins: list[tuple[float, float]], shown: str) -> None:
    assert matrix.closest([replace(PASSED, error=error, bound=bound) for error, bound in margins]) == shown


def test_tests_that_failed_have_no_share() -> None:
    assert matrix.closest([replace(PASSED, outcome="failed", bound=1.0)]) == "-"


def test_columns_are_in_the_order_asked_for_and_only_what_ran() -> None:
    results = [replace(PASSED, model=model) for model in ("b", None, "a")]
    assert matrix.columns(results, ["c", "b", "a"]) == ("b", "a", matrix.WITHOUT_MODEL)


def test_one_claim_name_in_two_files_is_two_claims() -> None:
    results = [PASSED, replace(PASSED, id="circuitfreeze/test_b.py::test_x[m]")]
    assert [row.file for row in matrix.rows(results, ["m"])] == [
        "circuitfreeze/test_a.py",
        "circuitfreeze/test_b.py",
    ]
    assert matrix.totals(results) == "2 claims on 1 model: 2 passed; 10 examples"


def test_refused_configs_put_a_star_on_the_cell_and_their_reasons_below() -> None:
    partly = replace(PASSED, refusals=("K of some heads is shared",))
    silent = replace(PASSED, claim="y", outcome="n/a", message="eager alone")
    whole = replace(PASSED, model="r", outcome="refused", message="no attention")
    results = [partly, silent, whole, replace(whole, claim="y")]
    assert [row.cells for row in matrix.rows(results, ["m", "r"])] == [("pass*", "refused"), ("n/a", "refused")]
    assert matrix.reasons(results) == [
        "m pass*: K of some heads is shared",
        "m n/a (y): eager alone",
        "r refused: no attention",
    ]


def test_what_is_not_offered_is_no_pass_and_its_reason_is_told_once() -> None:
    partly = replace(PASSED, not_offered=("no ste",))
    none = replace(PASSED, claim="y", outcome="not offered", not_offered=("no ste", "no y"))
    results = [partly, none, replace(partly, model="n", refusals=("MLA",)), replace(PASSED, claim="y", model="n")]
    assert [row.cells for row in matrix.rows(results, ["m", "n"])] == [("in part", "in part"), ("not offered", "pass")]
    assert matrix.totals(results).startswith("2 claims on 2 models: 3 passed (2 in part), 1 not offered;")
    assert matrix.reasons(results) == ["n pass*: MLA", "m, n not offered: no ste", "m not offered (y): no y"]
