"""Several cases in one example are judged each for itself."""

from __future__ import annotations

import pytest

from pytest_circuitfreeze.results import CircuitRecord
from pytest_circuitfreeze.suites.claims import Claim, ClaimBroken, Margin, NotApplicable
from pytest_circuitfreeze.suites.refusals import NotOffered, Refused
from pytest_circuitfreeze.suites.several import observe_each


def check(case: str) -> Margin:
    if case == "refused":
        raise Refused("not this one")
    if case == "not offered":
        raise NotOffered("not here")
    if case == "silent":
        raise NotApplicable("nothing to say")
    if case == "broken":
        Claim("all is well").broken("it is not")
    return Margin(0.25, 1.0)


def test_what_is_refused_or_silent_does_not_hide_the_others() -> None:
    record = CircuitRecord()
    observe_each(record, check, ["refused", "well", "silent", "not offered", "well"])
    assert (record.examples, record.error) == (2, 0.25)
    assert (record.refusals, record.not_offered, record.drawn_anew) == (["not this one"], ["not here"], 0)
    assert record.silent == "nothing to say"
    with pytest.raises(ClaimBroken, match="it is not"):
        observe_each(record, check, ["refused", "silent", "broken"])


@pytest.mark.parametrize(
    ("case", "error"), [("refused", Refused), ("not offered", NotOffered), ("silent", NotApplicable)]
)
def test_where_none_can_be_judged_it_is_said(case: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        observe_each(CircuitRecord(), check, [case, case])
