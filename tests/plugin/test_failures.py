"""What a person sees of a claim that broke."""

from __future__ import annotations

import shlex
from collections.abc import Callable

import pytest

Run = Callable[..., pytest.RunResult]
SUITE = """
    from hypothesis import given, settings, strategies

    from pytest_circuitfreeze.suites.claims import Claim

    @settings(settings.get_profile("circuitfreeze"))
    @given(number=strategies.integers(0, 1000))
    def test_breaks(circuit_model, number):
        Claim("Numbers are small", model=circuit_model, number=number).demand(number < 30, f"found {number}")

    @settings(settings.get_profile("circuitfreeze"))
    @given(number=strategies.integers(0, 1000))
    def test_raises(circuit_model, number):
        if number >= 30:
            raise KeyError(number)
"""
ON = ("--circuitfreeze", "--circuitfreeze-arch", "phi3", "--circuitfreeze-seed", "5", "circuitfreeze/test_gamma.py")


def test_broken_claim_shows_its_finding_and_how_to_run_it_again(stand_in: Run) -> None:
    result = stand_in(*ON, "-k", "breaks", test_gamma=SUITE)
    result.stdout.fnmatch_lines(
        [
            "_* test_breaks?phi3? _*",
            "Numbers are small: found 30",
            "  model: phi3",
            "  number: 30",
            "*- run it again -*",
            "pytest --circuitfreeze --circuitfreeze-arch phi3 --circuitfreeze-engine idle:Engine *-seed 5 *phi3?'",
            "FAILED circuitfreeze/test_gamma.py::test_breaks?phi3? - Numbers are small: fo*",
        ]
    )
    shown = result.stdout.str()
    assert "Traceback" not in shown
    assert "Failing test case" not in shown
    assert "def test_breaks" not in shown


def test_the_command_shown_does_run_it_again(stand_in: Run) -> None:
    shown = stand_in(*ON, "-k", "breaks", test_gamma=SUITE).outlines
    command = next(line for line in shown if line.startswith("pytest --circuitfreeze"))
    again = stand_in(*shlex.split(command)[1:], test_gamma=SUITE)
    again.assert_outcomes(failed=1, deselected=4)
    again.stdout.fnmatch_lines(["Numbers are small: found 30"])


def test_any_other_error_keeps_its_traceback_without_the_fixtures(stand_in: Run) -> None:
    result = stand_in(*ON, "-k", "raises", test_gamma=SUITE)
    result.stdout.fnmatch_lines(["*raise KeyError(number)", "E*Failing test case: test_raises(", "E*number=30,", "E*)"])
    assert "circuit_model='phi3'" not in result.stdout.str()


@pytest.mark.parametrize("style", ["short", "native"])
def test_a_style_of_traceback_that_was_chosen_is_kept(stand_in: Run, style: str) -> None:
    result = stand_in(*ON, f"--tb={style}", "-k", "breaks", test_gamma=SUITE)
    result.stdout.fnmatch_lines(["*demand(number < 30*", "*Numbers are small: found 30"])
