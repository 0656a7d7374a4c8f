"""How the shipped properties run: with the plugin's own Hypothesis profile, whatever a project has loaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from hypothesis import given, reject, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from pytest_circuitfreeze.architectures import Unbuilt
from pytest_circuitfreeze.engines import Engine
from pytest_circuitfreeze.results import CircuitRecord
from pytest_circuitfreeze.suites.claims import NotApplicable
from pytest_circuitfreeze.suites.judge.judged_sites import CannotJudge
from pytest_circuitfreeze.suites.judge.visible_state import remember_untouched
from pytest_circuitfreeze.suites.refusals import (
    Refused,
    Refusing,
    check_refusal,
    claim_not_offered,
    note,
    refusal,
)

__all__ = ["proven"]

Test = TypeVar("Test", bound=Callable[..., None])

PATIENCE = 40
"""Examples of one test that are drawn anew because the engine does not serve them; Hypothesis loses its own at 50."""


def proven(test: Test) -> Callable[..., None]:
    """Runs `test` on examples that it draws itself from its argument `data`, as many as the chosen profile says.

    What the engine refuses by name, or does not offer, is written down with its reason and another example is drawn;
    where it refuses the whole model, the refusal is what is tested. A claim that says nothing about the model is
    written down as such.
    """

    drawn: Any = given(data=st.data())(test)

    @wraps(test)
    def example(
        circuit_engine: Engine,
        circuit_model: PreTrainedModel | Unbuilt,
        circuit_record: CircuitRecord,
        data: st.DataObject,
    ) -> None:
        if isinstance(circuit_model, Unbuilt):
            circuit_record.not_applicable(circuit_model.reason)
            return
        reason = claim_not_offered(circuit_engine, test.__name__.removeprefix("test_"))
        if reason is not None:
            circuit_record.not_offered_config(reason)
            return
        reason = refusal(circuit_engine, circuit_model)
        if reason is not None:
            check_refusal(circuit_engine, circuit_model)
            circuit_record.refused_model(reason)
            return
        remember_untouched(circuit_model)
        try:
            test(Refusing(circuit_engine), circuit_model, circuit_record, data)
        except CannotJudge as unseen:
            if not hasattr(circuit_engine, "unfrozen"):
                raise
            circuit_record.not_applicable(f"cannot be judged: {unseen}")
        except NotApplicable as silent:
            circuit_record.not_applicable(str(silent))
        except Refused as refused:
            note(circuit_record, refused)
            circuit_record.drawn_anew += 1
            # Past that the example ends without a word, since an engine may serve none at all.
            if circuit_record.drawn_anew <= PATIENCE:
                reject()

    # Hypothesis's own place for what stands around a test, so that the test stays what is collected and shown.
    drawn.hypothesis.inner_test = example
    decorated: Callable[..., None] = settings(settings.get_profile("circuitfreeze"))(drawn)
    return decorated
