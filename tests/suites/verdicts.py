"""Runs one shipped property on one engine, as a run of the plugin does but in this process, and tells how it ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from pytest_circuitfreeze import recordings, suites
from pytest_circuitfreeze.engines import Engine
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

    finding: str
    examples: int


def verdict(claim: str, engine: Engine, model: PreTrainedModel, number: int) -> Verdict:
    """Runs `PROPERTIES[claim]` on the examples that the standard profile draws under `--circuitfreeze-seed number`.

    Recordings and statistics that the property draws are the engine's own, where it makes some.

    Raises:
        Exception: the engine ended the run by an error of its own, which is no verdict.
    """
    examples, findings = 0, []
    run = PROPERTIES[claim].hypothesis.inner_test  # type: ignore[attr-defined]

    def example(
        circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
    ) -> None:
        nonlocal examples
        examples += not findings  # what broke is run once more, to be shown
        try:
            run(circuit_engine, circuit_model, circuit_record, data)
        except ClaimBroken as broken:
            findings.append(str(broken))
            raise

    with ExitStack() as stack:
        for name in ("recorded", "calibrated"):
            if hasattr(engine, name):
                stack.enter_context(patch.object(recordings, name, getattr(engine, name)))
        try:
            seed(number)(STANDARD(given(data=st.data())(example)))(engine, model, CircuitRecord())
        except Exception:
            if not findings:
                raise
    return Verdict(findings[0] if findings else "", examples)
