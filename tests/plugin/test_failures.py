"""What a person sees of a claim that broke."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from textwrap import indent
from xml.etree import ElementTree

import pytest

Run = Callable[..., pytest.RunResult]
SUITE = """
    from hypothesis import given, settings, strategies
    from torch import tensor

    from pytest_circuitfreeze.strategies import Batch
    from pytest_circuitfreeze.suites.claims import Claim, check

    @check
    def check_small(model, batch, most=9):
        Claim("numbers are small").at_most("largest", float(batch.input_ids.max()), most, layer=2)

    @settings(settings.get_profile("circuitfreeze"))
    @given(number=strategies.integers(0, 1000))
    def test_breaks(circuit_model, number):
        check_small(circuit_model, Batch(tensor([[number]])), most=29)

    tries = iter(range(1000))

    @settings(settings.get_profile("circuitfreeze"))
    @given(number=strategies.integers(0, 1000))
    def test_breaks_once(circuit_model, number):
        check_small(circuit_model, Batch(tensor([[next(tries) == 3]]).long()), most=0)

    @settings(settings.get_profile("circuitfreeze"))
    @given(number=strategies.integers(0, 1000))
    def test_raises(circuit_model, number):
        if number >= 30:
            raise KeyError(number)
"""
ON = ("--circuitfreeze", "--circuitfreeze-arch", "phi3", "--circuitfreeze-seed", "5", "circuitfreeze/test_gamma.py")


def test_broken_claim_shows_its_finding_and_how_to_run_it_again(stand_in: Run) -> None:
    result = stand_in(*ON, "-k", "breaks and not once", test_gamma=SUITE)
    result.stdout.fnmatch_lines(
        [
            "_* test_breaks?phi3? _*",
            "numbers are small",
            "  found: largest: 30",
            "  at: layer 2",
            "  bound: 29",
            '  model: "phi3"',
            "  batch: Batch(torch.tensor(??30??))",
            "  most: 29",
            "*- without pytest -*",
            "import torch",
            "",
            "from pytest_circuitfreeze.strategies import Batch",
            "from stand_in.test_gamma import check_small",
            "",
            "torch.set_num_threads(1)*",
            "batch = Batch(torch.tensor(??30??))",
            "",
            'check_small("phi3", batch, most=29)',
            "*- run it again -*",
            "pytest --circuitfreeze --circuitfreeze-arch phi3 --circuitfreeze-engine idle:Engine *-seed 5 *phi3?'",
            "FAILED circuitfreeze/test_gamma.py::test_breaks?phi3? - numbers are small: la*",
        ]
    )
    shown = result.stdout.str()
    assert "Traceback" not in shown
    assert "Failing test case" not in shown
    assert "def test_breaks" not in shown
    assert shown.count("check_small(") == 1


def test_example_that_broke_once_is_shown_and_said_to_hold_now(stand_in: Run) -> None:
    result = stand_in(*ON, "-k", "once", test_gamma=SUITE)
    result.stdout.fnmatch_lines(
        ["numbers are small", "*- without pytest -*", "*- not again -*", "*held when it was tried again*"]
    )
    assert "Traceback" not in result.stdout.str()


def test_finding_is_in_the_report_and_in_junit_by_its_parts(stand_in: Run) -> None:
    options = ("--circuitfreeze-report", "out", "--junitxml", "junit.xml")
    stand_in(*ON, *options, "-k", "breaks and not once", test_gamma=SUITE)
    (entry,) = json.loads(Path("out/report.json").read_text())["results"]
    snippet = entry["failure"].pop("snippet")
    assert snippet.endswith('\ncheck_small("phi3", batch, most=29)\n')
    assert entry["failure"] == {
        "claim": "numbers are small",
        "found": "largest: 30",
        "place": {"layer": 2},
        "error": 30.0,
        "bound": 29,
        "arguments": {"model": '"phi3"', "batch": "Batch(torch.tensor([[30]]))", "most": "29"},
    }
    assert f"  ```python\n{indent(snippet, '  ')}  ```\n" in Path("out/report.md").read_text()
    properties = {one.get("name"): one.get("value") for one in ElementTree.parse("junit.xml").iter("property")}
    assert properties["circuitfreeze.failure.snippet"] == snippet
    assert properties["circuitfreeze.failure.place"] == "{'layer': 2}"


def test_the_command_shown_does_run_it_again(stand_in: Run) -> None:
    shown = stand_in(*ON, "-k", "breaks and not once", test_gamma=SUITE).outlines
    command = next(line for line in shown if line.startswith("pytest --circuitfreeze"))
    again = stand_in(*shlex.split(command)[1:], test_gamma=SUITE)
    again.assert_outcomes(failed=1, deselected=5)
    again.stdout.fnmatch_lines(["numbers are small", "  found: largest: 30"])


def test_any_other_error_keeps_its_traceback_without_the_fixtures(stand_in: Run) -> None:
    result = stand_in(*ON, "-k", "raises", test_gamma=SUITE)
    result.stdout.fnmatch_lines(["*raise KeyError(number)", "E*: test_raises(", "E*number=30,", "E*)"])
    assert "circuit_model='phi3'" not in result.stdout.str()


@pytest.mark.parametrize("style", ["short", "native"])
def test_a_style_of_traceback_that_was_chosen_is_kept(stand_in: Run, style: str) -> None:
    result = stand_in(*ON, f"--tb={style}", "-k", "breaks and not once", test_gamma=SUITE)
    result.stdout.fnmatch_lines(["*check_small(circuit_model*", "*found: largest: 30"])
    failures, _, _ = result.stdout.str().partition("short test summary")  # where CI is set, it has them whole again
    assert failures.count('check_small("phi3", batch, most=29)') == 1
