"""Without ``--circuitfreeze`` a run is what it would be without the plugin."""

from __future__ import annotations

import pytest

HEAVY = ("torch", "transformers", "hypothesis", "freeze_core", "tabulate", "pytest_circuitfreeze.suites")
LOOK = f"""
import sys

def test_look():
    assert [name for name in {HEAVY!r} if name in sys.modules] == []
"""


def test_nothing_heavy_is_imported(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(LOOK)
    result = pytester.runpytest_subprocess("-W", "error")
    result.assert_outcomes(passed=1)
    assert "circuitfreeze" not in result.stdout.str().partition("plugins:")[2].partition("\n")[2]


def test_the_look_would_see_an_import(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(LOOK.replace("import sys", "import sys, tabulate"))
    pytester.runpytest_subprocess("-W", "error").assert_outcomes(failed=1)


def test_bad_ini_does_not_disturb_a_run_that_does_not_use_it(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\ncircuitfreeze_arch = nope\ncircuitfreeze_bench = true")
    pytester.makepyfile("def test_mine(): pass")
    pytester.runpytest_subprocess().assert_outcomes(passed=1)


def test_project_without_tests_still_has_none(pytester: pytest.Pytester) -> None:
    assert pytester.runpytest_subprocess().ret == pytest.ExitCode.NO_TESTS_COLLECTED


def test_turned_off_it_has_no_options(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_mine(): pass")
    pytester.runpytest_subprocess("-p", "no:circuitfreeze").assert_outcomes(passed=1)
    result = pytester.runpytest_subprocess("-p", "no:circuitfreeze", "--circuitfreeze")
    assert result.ret == pytest.ExitCode.USAGE_ERROR


def test_fixtures_are_there_for_a_projects_own_tests(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        from freeze_core import InterventionConfig

        def test_mine(tiny_gpt2, freezer, circuit_engine):
            assert circuit_engine.name == "freeze_core"
            with freezer.freeze_circuits(tiny_gpt2, InterventionConfig()):
                pass

        def test_each(circuit_model):
            assert not circuit_model.training
        """
    )
    # In a process of its own: pytester forgets the modules of a run, and transformers looks for its own later.
    result = pytester.runpytest_subprocess("--circuitfreeze-arch", "gpt2,llama")
    result.assert_outcomes(passed=3)
    assert "circuitfreeze:" not in result.stdout.str()


def test_fixtures_are_documented(pytester: pytest.Pytester) -> None:
    shown = pytester.runpytest_inprocess("--fixtures").stdout.str()
    ours = shown.partition("fixtures defined from pytest_circuitfreeze")[2].partition("fixtures defined from")[0]
    for name in ("circuit_model", "circuit_engine", "circuit_record", "freezer"):
        assert f"\n{name} [session scope]" in ours
    for name in ("tiny_gpt2", "tiny_llama", "tiny_mistral_gqa", "tiny_falcon_mqa"):
        assert f"\n{name} [session scope]" in ours
    assert "no docstring available" not in ours
