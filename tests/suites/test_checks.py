"""Every shipped property accepts honest engines and refuses engines that are broken on purpose: one seed of each.

`tox -e seeds` runs many seeds, and `docs/claims/seeds.md` has what came of it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from broken_engines import BROKEN, architectures_of
from honest_engine import HookEngine
from snippet_runs import WIDTH, demand_the_same, run, snippet_of
from verdicts import PROPERTIES, in_the_librarys_place, verdict

from pytest_circuitfreeze import suites
from pytest_circuitfreeze.engines import Engine, FreezeCore, load_engine
from pytest_circuitfreeze.models import tiny_model

OF_THE_LIBRARY = ("recordings_are_what_attention_saw", "statistics_are_of_the_real_tokens")
"""Claims that say nothing of other engines, once."""

FOLDER = Path(next(iter(suites.__path__)))


def checks_in(pattern: str) -> set[str]:
    """The names of the checks that the modules of the suites with such a name define or import."""
    modules = [import_module(f"{suites.__name__}.{path.stem}") for path in sorted(FOLDER.glob(pattern))]
    return {name for module in modules for name in vars(module) if name.startswith("check_")}


def test_each_check_is_run_by_a_property() -> None:
    # What every property does with a refusal is in `proven`.
    assert checks_in("test_*.py") == checks_in("[!t]*.py") - {"check_refusal"}


def test_each_property_has_broken_engines() -> None:
    assert set(BROKEN) == set(PROPERTIES)
    assert len({broken for several in BROKEN.values() for broken in several}) >= 80


@pytest.mark.parametrize(("make", "architecture"), [(HookEngine, "mistral_gqa"), (FreezeCore, "falcon_mqa")])
@pytest.mark.parametrize("claim", PROPERTIES)
def test_honest_engine_is_accepted(claim: str, make: Callable[[], Engine], architecture: str) -> None:
    ended = verdict(claim, make(), tiny_model(architecture), 0)
    assert ended.broken is None
    assert ended.examples >= (1 if claim in OF_THE_LIBRARY and make is not FreezeCore else 25)


@pytest.mark.parametrize(
    ("claim", "broken"), [(claim, broken) for claim, several in BROKEN.items() for broken in several]
)
def test_broken_engine_is_refused_and_the_snippet_shows_why(claim: str, broken: type[HookEngine]) -> None:
    engine = load_engine(f"{broken.__module__}:{broken.__name__}")
    known = verdict(claim, engine, tiny_model(architectures_of(broken)[0]), 0).broken
    assert known
    assert known.__notes__ == [f"\nWithout pytest:\n\n{snippet_of(known)}"]
    assert all(len(line) <= WIDTH for line in snippet_of(known).splitlines())
    with in_the_librarys_place(broken()):
        demand_the_same(run(snippet_of(known)), known)
