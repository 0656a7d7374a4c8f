"""Runs of pytest with a stand-in for the shipped suites, so that the mechanism is tested apart from the product."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

# Test files are imported by their paths; what they share is not found that way.
sys.path.append(str(Path(__file__).parent))

STAND_IN = {
    "__init__": "",
    # Replaces the shipped suites in the process that loads it, a worker's included.
    "stand_in_plugin": """
        from pytest_circuitfreeze import collect, fixtures

        collect.SUITES = "stand_in"
        # A model is its own name, which takes no torch.
        fixtures._load = lambda target, settings: target
    """,
    "test_alpha": """
        from types import SimpleNamespace

        from hypothesis import given, settings, strategies

        def margin(error, bound):
            return SimpleNamespace(error=error, bound=bound)

        def test_second_by_name(circuit_model, circuit_record):
            '''A claim that holds bit for bit.

            More about it.
            '''
            circuit_record.observe(margin(0.0, 0.0))

        @settings(settings.get_profile("circuitfreeze"))
        @given(number=strategies.integers(0, 2**64))
        def test_a_property(circuit_model, circuit_record, number):
            '''A claim that holds within a bound.'''
            print("drew", number)
            circuit_record.observe(margin(0.25, 1.0))
    """,
    "test_beta": """
        def test_something_else(circuit_model, circuit_record):
            '''A claim in a file of its own.'''
    """,
}

IDLE_ENGINE = """
    from contextlib import nullcontext

    class Engine:
        name = "idle"

        def freeze(self, model, config):
            return nullcontext(model)
"""


@pytest.fixture
def stand_in(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Callable[..., pytest.RunResult]:
    """Runs pytest, in a process of its own, in a project's folder, with the stand-in installed beside it.

    ``stand_in(*arguments, test_more="...")`` adds a suite file. The engine is one that does nothing, and a model is the
    string that names it.
    """
    installed = pytester.mkdir("installed")
    project = pytester.mkdir("project")
    monkeypatch.setenv("PYTHONPATH", str(installed))
    # Two runs in one test must not share a bytecode file: sources of the same second and size look the same.
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    (installed / "stand_in").mkdir()
    (installed / "idle.py").write_text(dedent(IDLE_ENGINE))
    monkeypatch.chdir(project)

    def run(*arguments: str, **files: str) -> pytest.RunResult:
        for name, text in {**STAND_IN, **files}.items():
            (installed / "stand_in" / f"{name}.py").write_text(dedent(text))
        return pytester.runpytest_subprocess(
            "-p", "stand_in.stand_in_plugin", "-W", "error", "-o", "circuitfreeze_engine=idle:Engine", *arguments
        )

    return run
