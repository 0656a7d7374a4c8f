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
from verdicts import PROPERTIES, verdict

from pytest_circuitfreeze import suites
from pytest_circuitfreeze.engines import Engine, FreezeCore
from pytest_circuitfreeze.models import tiny_model

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
    assert not ended.finding
    assert ended.examples >= 25


@pytest.mark.parametrize(
    ("claim", "broken"), [(claim, broken) for claim, several in BROKEN.items() for broken in several]
)
def test_broken_engine_is_refused(claim: str, broken: type[HookEngine]) -> None:
    assert verdict(claim, broken(), tiny_model(architectures_of(broken)[0]), 0).finding
