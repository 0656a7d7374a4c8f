"""What an engine does not claim is not offered: no pass, no failure, no refusal, and told with its reason."""

from __future__ import annotations

import json
from textwrap import dedent

import pytest

RUN = ("--circuitfreeze", "--circuitfreeze-profile=quick", "-p", "no:cacheprovider", "--circuitfreeze-arch=gpt2")
ONE = "circuitfreeze/test_values.py::test_zero_strength_is_unfrozen"
ENGINES = """
    from pytest_circuitfreeze.engines import FreezeCore

    class Nothing(FreezeCore):
        name = "nothing"

        def supports(self, model, config):
            return "it has not been written yet"

        def freeze(self, model, config):
            raise AssertionError("asked for what is not offered")

    class Quarter(FreezeCore):
        name = "quarter"

        def supports(self, model, config):
            return None if config.circuit == "ov" and config.freeze_type == "zero" else "only OV goes to zero"

    class NoClaim(Nothing):
        not_offered = {"zero_strength_is_unfrozen": "strength is not a word of ours"}

        def supports(self, model, config):
            raise AssertionError("asked about a claim that is not made")

    class Broken(Quarter):
        def freeze(self, model, config):
            from dataclasses import replace

            return super().freeze(model, replace(config, strength=1.0))
"""


@pytest.fixture
def engines(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makepyfile(mine=dedent(ENGINES))
    return pytester


def test_an_engine_that_offers_nothing_passes_nothing(engines: pytest.Pytester) -> None:
    result = engines.runpytest_subprocess(*RUN, "--circuitfreeze-engine=mine:Nothing", "-rs", ONE)
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(
        [
            "*zero strength is unfrozen  not offered      -",
            "gpt2 not offered: it has not been written yet",
            "1 claim on 1 model: 1 not offered; 0 examples",
            "SKIPPED*not offered: it has not been written yet",
        ]
    )


def test_a_claim_that_is_not_made_is_not_tried(engines: pytest.Pytester) -> None:
    result = engines.runpytest_subprocess(*RUN, "--circuitfreeze-engine=mine:NoClaim", ONE)
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["gpt2 not offered: strength is not a word of ours"])


def test_what_is_offered_is_drawn_until_it_is_found(engines: pytest.Pytester) -> None:
    result = engines.runpytest_subprocess(
        *RUN, "--circuitfreeze-engine=mine:Quarter", "--circuitfreeze-report=out", ONE
    )
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        ["*zero strength is unfrozen*in part*", "gpt2 not offered: only OV goes to zero", "*1 passed (1 in part); *"]
    )
    (found,) = json.loads((engines.path / "out" / "report.json").read_text())["results"]
    assert (found["outcome"], found["not_offered"], found["refusals"]) == ("passed", ["only OV goes to zero"], [])
    assert 0 < found["examples"] <= 8
    assert "gpt2 not offered: only OV goes to zero" in (engines.path / "out" / "report.md").read_text()


def test_what_is_offered_and_broken_fails(engines: pytest.Pytester) -> None:
    result = engines.runpytest_subprocess(*RUN, "--circuitfreeze-engine=mine:Broken", "--circuitfreeze-report=out", ONE)
    result.assert_outcomes(failed=1)
    (found,) = json.loads((engines.path / "out" / "report.json").read_text())["results"]
    assert found["outcome"] == "failed"
    assert {"engine", "config", "batch"} <= found["failure"]["arguments"].keys()


@pytest.mark.parametrize(
    "claim",
    [
        "test_references.py::test_recordings_are_what_attention_saw",
        "test_calibration.py::test_statistics_are_of_the_real_tokens",
    ],
)
def test_what_is_of_freeze_core_alone_says_nothing_of_others(engines: pytest.Pytester, claim: str) -> None:
    result = engines.runpytest_subprocess(*RUN, "--circuitfreeze-engine=hooks", f"circuitfreeze/{claim}")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["gpt2 n/a: * are freeze_core's, whichever engine *"])
