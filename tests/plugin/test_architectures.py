"""Names of architectures: built in, types of transformers, or all; what is refused or cannot be built is said."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pytest_circuitfreeze.architectures import every_architecture, model_types
from pytest_circuitfreeze.models import TINY
from pytest_circuitfreeze.options import parse_architectures
from pytest_circuitfreeze.shrinking import causal_lm_types

ONE = "circuitfreeze/test_values.py::test_zero_strength_is_unfrozen"
RUN = ("--circuitfreeze", "--circuitfreeze-profile=quick", "-p", "no:cacheprovider")


def test_types_are_those_of_transformers() -> None:
    assert list(model_types()) == causal_lm_types()


def test_all_is_every_name_once() -> None:
    found = parse_architectures("all")
    assert found == every_architecture()
    assert len(set(found)) == len(found)
    assert set(found) == {*TINY, *causal_lm_types()}


def test_a_type_is_taken_by_its_name() -> None:
    assert parse_architectures("gpt2, zamba2") == ("gpt2", "zamba2")


def test_names_are_checked_without_torch_or_transformers() -> None:
    code = (
        "import sys; from pytest_circuitfreeze.options import parse_architectures as p; p('zamba2'); p('all'); "
        "print(*[name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_type_that_is_refused_passes_as_refused(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_subprocess(*RUN, "--circuitfreeze-arch=mamba", ONE)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*zero strength is unfrozen*refused*", "mamba refused: MambaForCausalLM has no *"])


def test_a_refusal_that_is_none_is_refused(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        shy="""
        from pytest_circuitfreeze.engines import FreezeCore

        class Engine(FreezeCore):
            name = "shy"

            def refuses(self, model):
                return "it is too hard for me"
        """
    )
    result = pytester.runpytest_subprocess(*RUN, "--circuitfreeze-arch=gpt2", "--circuitfreeze-engine=shy:Engine", ONE)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*a refusal names its reason and installs nothing", "*found: it was not refused"])


def test_a_type_that_cannot_be_built_is_an_error_when_it_is_named(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_subprocess(*RUN, "--circuitfreeze-arch=blt", ONE)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*a tiny model of type 'blt' cannot *"])


def test_configs_that_are_refused_put_a_star_on_the_cell(pytester: pytest.Pytester) -> None:
    keys = "circuitfreeze/test_grouping.py::test_frozen_queries_and_keys_reach_their_readers"
    result = pytester.runpytest_subprocess(*RUN, "--circuitfreeze-arch=deepseek_v3", keys)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        ["*frozen queries and keys reach*pass[*]*", "deepseek_v3 pass[*]: *kv_a_proj_with_mqa*"]
    )


def test_a_claim_that_says_nothing_is_not_applicable(pytester: pytest.Pytester) -> None:
    implementations = "circuitfreeze/test_values.py::test_implementations_agree"
    result = pytester.runpytest_subprocess(*RUN, "--circuitfreeze-arch=bloom", implementations)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*implementations agree*n/a*", "bloom n/a: BloomForCausalLM runs under eager *"])
