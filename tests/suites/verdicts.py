"""Runs one shipped property on one engine, as a run of the plugin does but in this process, and tells how it ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from pytest_circuitfreeze import recordings, suites
from pytest_circuitfreeze.engines import Engine, FreezeCore
from pytest_circuitfreeze.origins import remembered
from pytest_circuitfreeze.profiles import NAME, register
from pytest_circuitfreeze.results import CircuitRecord
from pytest_circuitfreeze.suites.claims import ClaimBroken

# The suites' test files look it up when they are imported.
register("standard")
# A refusal is what counts here, not the smallest example of it.
STANDARD = settings(settings.get_profile(NAME), phases=[Phase.generate])

PROPERTIES: Mapping[str, Callable[..., Any]] = {
    name.removeprefix("test_"): function
    for path in sorted(Path(next(iter(suites.__path__))).glob("test_*.py"))
    for name, function in vars(import_module(f"{suites.__name__}.{path.stem}")).items()
    if name.startswith("test_")
}
"""The shipped properties, by claim."""


class Verdict(NamedTuple):
    """How a property ended: what it refused the engine for, if it did, and after how many examples."""

    broken: ClaimBroken | None
    examples: int


def verdict(claim: str, engine: Engine, model: PreTrainedModel, number: int) -> Verdict:
    """Runs `PROPERTIES[claim]` on the examples that the standard profile draws under `--circuitfreeze-seed number`.

    Raises:
        Exception: the engine ended the run by an error of its own, which is no verdict.
    """
    examples, findings = 0, []
    run = PROPERTIES[claim].hypothesis.inner_test

    def example(
        circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
    ) -> None:
        nonlocal examples
        examples += not findings  # what broke is run once more, to be shown
        try:
            run(circuit_engine, circuit_model, circuit_record, data)
        except ClaimBroken as broken:
            findings.append(broken)
            raise

    with in_the_librarys_place(engine) as judged:
        try:
            seed(number)(STANDARD(given(data=st.data())(example)))(judged, model, CircuitRecord())
        except Exception:
            if not findings:
                raise
    return Verdict(findings[0] if findings else None, examples)


@contextmanager
def in_the_librarys_place(engine: Any) -> Iterator[Engine]:
    """Puts an engine's own way to record or to calibrate where the library's is, and gives the engine to be judged.

    Of such an engine that is the library's own: who freezes is no part of those claims.
    """
    own = [name for name in ("recorded", "calibrated") if hasattr(engine, name)]
    with ExitStack() as stack:
        for name in own:
            stack.enter_context(patch.object(recordings, name, _imported_from_there(name, getattr(engine, name))))
        yield FreezeCore() if own else engine


def _imported_from_there(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
    """`own` under the name that the library has for it, which a snippet then imports."""

    def maker(model: Any, given: Any, layers: Any = None) -> Any:
        return own(model, given, layers)

    maker.__name__, maker.__module__ = name, recordings.__name__
    return remembered(maker)
