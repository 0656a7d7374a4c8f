"""Engines: how they are named, built, judged to be engines, and refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from types import ModuleType, SimpleNamespace

import pytest

from freeze_core import FreezeNotInForceError, InterventionConfig
from pytest_circuitfreeze import engines
from pytest_circuitfreeze.engines import EngineError, load_engine
from pytest_circuitfreeze.models import tiny_model

Run = Callable[..., pytest.RunResult]


class Good:
    """An engine that counts how often it was built."""

    name = "good"
    built = 0

    def __init__(self) -> None:
        type(self).built += 1

    def freeze(self, model, config):
        raise FreezeNotInForceError("not asked to")


def refuse():
    raise RuntimeError("no licence")


@pytest.fixture(autouse=True)
def module(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ModuleType("someones")
    found.Good = Good
    found.instance = Good()
    found.factory = lambda: Good()
    found.refuse = refuse
    found.nothing = 3
    found.nameless = SimpleNamespace(name=None, freeze=print)
    found.half = SimpleNamespace(name="half", freeze=None)
    found.inner = SimpleNamespace(Good=Good)
    monkeypatch.setitem(sys.modules, "someones", found)


def test_built_in_engine_freezes_and_lets_go() -> None:
    engine = load_engine("freeze_core")
    model = tiny_model("gpt2")
    before = dict(vars(model.transformer.h[0].attn))
    with engine.freeze(model, InterventionConfig()) as frozen:
        assert callable(frozen)
        assert vars(model.transformer.h[0].attn) != before
    assert vars(model.transformer.h[0].attn) == before


@pytest.mark.parametrize("spec", ["someones:Good", "someones:instance", "someones:factory", "someones:inner.Good"])
def test_class_factory_and_instance_are_engines(spec: str) -> None:
    built = Good.built
    assert load_engine(spec).name == "good"
    assert Good.built - built == (spec != "someones:instance")


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("nobodys:Good", "No module named 'nobodys'"),
        ("someones:Bad", "has no attribute 'Bad'"),
        ("someones:refuse", "RuntimeError: no licence"),
        ("someones:nothing", "'int' object is not callable"),
        ("someones:nameless", "'types.SimpleNamespace' object is not callable"),
        ("someones:half", "'types.SimpleNamespace' object is not callable"),
        ("unheard", "'unheard' is no engine; choose from freeze_core"),
    ],
)
def test_what_is_no_engine_is_refused_by_name(spec: str, reason: str) -> None:
    with pytest.raises(EngineError) as caught:
        load_engine(spec)
    assert repr(spec) in str(caught.value)
    assert reason in str(caught.value)


@pytest.mark.parametrize("name", engines.EXTRAS)
def test_a_library_that_is_missing_is_named_with_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"pytest_circuitfreeze.adapters.{name}", raising=False)
    extra = engines.EXTRAS[name]
    with pytest.raises(EngineError, match=rf"needs {extra}, which is not installed: pip install .*\[{extra}\]'"):
        load_engine(name)


def test_entry_points_are_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("theirs", "someones:Good", engines.GROUP)
    monkeypatch.setattr(engines, "entry_points", lambda group: [entry] if group == engines.GROUP else [])
    assert load_engine("theirs").name == "good"
    with pytest.raises(EngineError, match=r"choose from freeze_core, hooks, .*, theirs"):
        load_engine("other")


def test_entry_points_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [EntryPoint("theirs", value, engines.GROUP) for value in ("someones:Good", "elses:Good")]
    monkeypatch.setattr(engines, "entry_points", lambda group: entries)
    with pytest.raises(EngineError, match=r"several entry points \(someones:Good, elses:Good\)"):
        load_engine("theirs")


def test_one_instance_serves_the_whole_run(stand_in: Run) -> None:
    counting = """
        class Engine:
            name = "counting"
            built = 0

            def __init__(self):
                Engine.built += 1

            def freeze(self, model, config):
                raise NotImplementedError

        def test_engine(circuit_model, circuit_engine):
            assert (circuit_engine.name, circuit_engine.built) == ("counting", 1)
    """
    result = stand_in(
        "--circuitfreeze", "--circuitfreeze-engine=stand_in.test_gamma:Engine", "-k", "gamma", test_gamma=counting
    )
    result.assert_outcomes(passed=4, deselected=12)


def test_engine_that_cannot_be_loaded_is_one_clear_error(stand_in: Run) -> None:
    result = stand_in("--circuitfreeze", "--circuitfreeze-engine=nobodys:Engine", "circuitfreeze")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    message = "engine 'nobodys:Engine' cannot be loaded: ModuleNotFoundError: No module named 'nobodys'"
    result.stdout.fnmatch_lines([f"ERROR Failed: {message}"])
    assert "fixtures.py" not in result.stdout.str()
