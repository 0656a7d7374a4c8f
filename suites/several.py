"""Several freezes in one example, each judged for itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from pytest_circuitfreeze.results import CircuitRecord
from pytest_circuitfreeze.suites.claims import Margin, NotApplicable
from pytest_circuitfreeze.suites.refusals import Refused, note

__all__ = ["observe_each"]

T = TypeVar("T")


def observe_each(record: CircuitRecord, check: Callable[[T], Margin], cases: Iterable[T]) -> None:
    """Takes what `check` finds of each case into the record.

    Cases that are refused, or of which the claim says nothing, do not keep the others from being judged.

    Raises:
        ClaimBroken: by the first case that breaks the claim.
        Refused, NotApplicable: there is no case that could be judged.
    """
    told: Refused | NotApplicable | None = None
    judged = 0
    for case in cases:
        try:
            record.observe(check(case))
        except Refused as refused:
            note(record, refused)
            told = refused
        except NotApplicable as silent:
            record.not_applicable(str(silent))
            told = silent
        else:
            judged += 1
    if told is not None and not judged:
        raise told
