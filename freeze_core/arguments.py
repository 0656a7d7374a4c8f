"""Checks of arguments: one wording for each kind of invalid value."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import NoReturn, TypeGuard

from freeze_core.errors import InterventionError, shown

__all__ = [
    "check_choice",
    "check_flag",
    "check_int",
    "check_type",
    "is_distinct",
    "is_finite",
    "is_index",
    "is_int",
    "refuse",
]


def refuse(name: str, value: object, allowed: str) -> NoReturn:
    """Raises `InterventionError`: what was passed, and what is allowed."""
    raise InterventionError(f"{name}={shown(value)}: must be {allowed}")


def is_int(value: object) -> TypeGuard[int]:
    """Whether `value` is an int. A bool is an int in Python, but never a number here."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_index(value: object) -> TypeGuard[int]:
    """The same for integers of any library, such as NumPy's."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_finite(value: object, least: float = -math.inf, most: float = math.inf) -> TypeGuard[float]:
    """Whether `value` is a finite real number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        number = float(value)
    except (OverflowError, ValueError):  # an int of hundreds of digits, a signalling nan
        return False
    return math.isfinite(number) and least <= number <= most


def is_distinct(values: object, kind: Callable[[object], bool]) -> TypeGuard[Sequence[object]]:
    """Whether `values` is a list of different values of one kind, not empty."""
    if isinstance(values, str | bytes) or not isinstance(values, Sequence) or not len(values):
        return False
    return all(map(kind, values)) and len(set(values)) == len(values)


def check_flag(name: str, value: object) -> None:
    """Raises `InterventionError` unless `value` is a bool."""
    if not isinstance(value, bool):
        refuse(name, value, "True or False")


def check_int(name: str, value: object, least: int, *, below: float = math.inf, optional: bool = False) -> None:
    """Raises `InterventionError` unless `value` is an int from `least` on, or `None` where that is allowed."""
    if not (value is None and optional) and not (is_int(value) and least <= value < below):
        limit = f" and less than {below}" if below < math.inf else ""
        refuse(name, value, f"{'None or ' * optional}an int of at least {least}{limit}")


def check_type(name: str, value: object, kind: type, what: str) -> None:
    """Raises `InterventionError` unless `value` is a `kind`, which users know as `what`."""
    if not isinstance(value, kind):
        refuse(name, value, what)


def check_choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raises `InterventionError` unless `value` is one of the `allowed` texts."""
    if not isinstance(value, str) or value not in list(allowed):
        refuse(name, value, f"one of {', '.join(allowed)}")
