"""A claim's message says what broke where, and its margin is the one closest to its bound."""

from __future__ import annotations

import pytest
import torch

from pytest_circuitfreeze.suites.claims import Claim, ClaimBroken, Margin


def test_message_names_claim_place_values_bound_and_circumstances() -> None:
    claim = Claim("nothing moves", config="the config", model=torch.nn.Linear(1, 1))
    got = torch.zeros(2, 3)
    got[1, 2] = 0.5
    with pytest.raises(ClaimBroken) as caught:
        claim.within("v of layer 0", got, torch.zeros(2, 3), 0.25, "batch token")
    assert str(caught.value) == (
        "nothing moves: v of layer 0 differs by 0.5 at batch 1, token 2: 0.5 where 0 was due, within 0.25\n"
        "  config: the config\n"
        "  model: Linear"
    )


def test_same_is_bit_for_bit() -> None:
    claim = Claim("nothing moves")
    one = torch.tensor([1.0, float("nan"), float("inf"), 0.0])
    claim.same("x", one, torch.tensor([1.0, float("nan"), float("inf"), -0.0]))
    for place in range(4):
        other = one.clone()
        other[place] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
        with pytest.raises(ClaimBroken, match=f"at axis 0 {place}: .*, bit for bit"):
            claim.same("x", other, one)


def test_nan_is_never_within() -> None:
    with pytest.raises(ClaimBroken, match="differs by inf"):
        Claim("nothing moves").within("x", torch.tensor([float("nan")]), torch.tensor([0.0]), 1e30)


def test_a_bound_of_nan_allows_nothing() -> None:
    claim = Claim("nothing moves")
    claim.within("x", torch.ones(2), torch.ones(2), float("nan"))
    assert claim.margin == Margin(0.0, 0.0)
    with pytest.raises(ClaimBroken, match="bit for bit"):
        claim.within("x", torch.ones(2), torch.zeros(2), float("nan"))


def test_the_worst_is_measured_against_its_own_bound() -> None:
    with pytest.raises(ClaimBroken, match="axis 0 1"):
        Claim("nothing moves").within("x", torch.tensor([3.0, 2.0]), torch.zeros(2), torch.tensor([4.0, 1.0]))


def test_shapes_must_agree() -> None:
    with pytest.raises(ClaimBroken, match=r"x has shape \[2\], not \[3\]"):
        Claim("nothing moves").same("x", torch.zeros(2), torch.zeros(3))


def test_margin_is_the_closest_to_its_bound() -> None:
    claim = Claim("little moves")
    assert claim.margin == Margin(0.0, 0.0)
    claim.within("x", torch.tensor([0.5]), torch.zeros(1), 1.0)
    claim.within("y", torch.tensor([10.0]), torch.zeros(1), 1000.0)
    claim.same("z", torch.ones(1), torch.ones(1))
    assert claim.margin == Margin(0.5, 1.0)


def test_nothing_to_compare_is_no_difference() -> None:
    claim = Claim("nothing moves")
    claim.same("x", torch.zeros(0), torch.zeros(0))
    assert claim.margin == Margin(0.0, 0.0)


def test_a_single_number_has_its_only_place() -> None:
    with pytest.raises(ClaimBroken, match="at its only element"):
        Claim("nothing moves").same("x", torch.tensor(1.0), torch.tensor(2.0))


def test_demand_says_what_was_found() -> None:
    Claim("all is well").demand(True, "it is not")
    with pytest.raises(ClaimBroken, match="all is well: it is not"):
        Claim("all is well").demand(False, "it is not")
