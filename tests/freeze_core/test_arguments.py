"""Checks of arguments: what each accepts, and the one wording in which it refuses the rest."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from freeze_core import InterventionError, KVScope
from freeze_core.arguments import (
    check_choice,
    check_flag,
    check_int,
    check_type,
    is_distinct,
    is_finite,
    is_index,
    is_int,
)


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: check_int("top", 0, 1), "top=0: must be an int of at least 1"),
        (lambda: check_int("top", True, 1), "top=True: must be an int of at least 1"),
        (lambda: check_int("top", 1.0, 1), "top=1.0: must be an int of at least 1"),
        (lambda: check_int("top", None, 1), "top=None: must be an int of at least 1"),
        (lambda: check_int("top", "x", 1, optional=True), "top='x': must be None or an int of at least 1"),
        (
            lambda: check_int("seed", 8, 0, below=8),
            "seed=8: must be an int of at least 0 and less than 8",
        ),
        (lambda: check_flag("progress", 1), "progress=1: must be True or False"),
        (lambda: check_flag("progress", None), "progress=None: must be True or False"),
        (lambda: check_choice("by", "token", ("head", "position")), "by='token': must be one of head, position"),
        (lambda: check_choice("by", None, ("head",)), "by=None: must be one of head"),
        (lambda: check_choice("kv_scope", ["head"], KVScope), r"kv_scope=\['head'\]: must be one of group, head"),
        (lambda: check_type("study", 3, dict, "a study"), "study=3: must be a study"),
    ],
)
def test_invalid_arguments_raise(check: Any, message: str) -> None:
    with pytest.raises(InterventionError, match=f"^{message}$"):
        check()


def test_valid_arguments_pass() -> None:
    check_int("top", 1, 1)
    check_int("top", None, 1, optional=True)
    check_int("seed", 7, 0, below=8)
    check_flag("progress", False)
    check_choice("kv_scope", KVScope.HEAD, KVScope)
    check_choice("kv_scope", "head", KVScope)
    check_type("study", {}, dict, "a study")


@pytest.mark.parametrize("value", [True, np.bool_(True), 1.0, "1", None, torch.tensor(1)])
def test_only_integers_are_indices(value: object) -> None:
    assert not is_index(value)
    assert not is_int(value)
    assert is_index(np.int64(3))
    assert not is_int(np.int64(3))
    assert is_int(3)


@pytest.mark.parametrize("value", [True, "1", None, float("nan"), float("inf"), 10**400, Decimal("0.5"), 1j])
def test_only_finite_real_numbers_are_finite(value: object) -> None:
    assert not is_finite(value)
    assert all(map(is_finite, (0, -1.5, Fraction(1, 3), np.float32(2))))
    assert is_finite(1, 0, 1)
    assert not is_finite(1.1, 0, 1)
    assert not is_finite(-0.1, 0, 1)


@pytest.mark.parametrize("values", [[], (), "01", b"01", 3, None, [1, 1], [1, True], [1, "2"], {1: 2}, {1}, [[1]]])
def test_only_lists_of_different_values_of_a_kind_are_distinct(values: object) -> None:
    assert not is_distinct(values, is_int)
    assert is_distinct([1, 0, -1], is_int)
    assert is_distinct(range(3), is_int)
