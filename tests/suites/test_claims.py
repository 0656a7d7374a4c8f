"""A claim's message says what broke where, and its margin is the one closest to its bound."""

from __future__ import annotations

import pytest
import torch

from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.claims import Claim, ClaimBroken, Margin, check


@check
def check_nothing_moves(model: object, got: Batch, allowed: float = 0.0) -> None:
    want = torch.zeros(got.input_ids.shape)
    Claim("nothing moves").within("v", got.input_ids, want, allowed, "row position", layer=3)


def test_message_names_claim_finding_place_bound_and_arguments() -> None:
    with pytest.raises(ClaimBroken) as caught:
        check_nothing_moves(torch.nn.Linear(1, 1), Batch(torch.tensor([[0, 0, 0], [0, 0, 2]])), allowed=0.25)
    assert str(caught.value) == (
        "nothing moves\n"
        "  found: v off by 2: 2 where 0 was due\n"
        "  at: layer 3, row 1, position 2\n"
        "  bound: 0.25\n"
        "  model: Linear\n"
        "  got: Batch(torch.tensor([[0, 0, 0], [0, 0, 2]]))\n"
        "  allowed: 0.25"
    )
    assert caught.value.headline == "nothing moves: v off by 2: 2 where 0 was due, at layer 3, row 1, position 2"
    assert caught.value.place == {"layer": 3, "row": 1, "position": 2}
    assert caught.value.margin == Margin(2.0, 0.25)


def test_of_nested_checks_the_inner_one_is_told() -> None:
    @check
    def check_outer(model: object) -> None:
        check_nothing_moves(model, Batch(torch.ones(1, 1)))

    with pytest.raises(ClaimBroken) as caught:
        check_outer(torch.nn.Linear(1, 1))
    assert caught.value.call is not None
    assert list(caught.value.call.circumstances()) == ["model", "got"]


def test_same_is_bit_for_bit() -> None:
    claim = Claim("nothing moves")
    one = torch.tensor([1.0, float("nan"), float("inf"), 0.0])
    claim.same("x", one, torch.tensor([1.0, float("nan"), float("inf"), -0.0]))
    for place in range(4):
        other = one.clone()
        other[place] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
        with pytest.raises(ClaimBroken, match=f"at: axis 0 {place}\n  bound: 0, bit for bit"):
            claim.same("x", other, one)


def test_nan_is_never_within() -> None:
    with pytest.raises(ClaimBroken, match="off by inf"):
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
    with pytest.raises(ClaimBroken, match="x off by 1: 1 where 2 was due"):
        Claim("nothing moves").same("x", torch.tensor(1.0), torch.tensor(2.0))


def test_demand_says_what_was_found() -> None:
    Claim("all is well").demand(True, "it is not")
    with pytest.raises(ClaimBroken) as caught:
        Claim("all is well").demand(False, "it is not", layer=2)
    assert caught.value.headline == "all is well: it is not, at layer 2"
    assert caught.value.margin is None


def test_what_was_measured_is_at_most_its_bound() -> None:
    claim = Claim("little moves")
    claim.at_most("distance", 1.0, 2.0)
    assert claim.margin == Margin(1.0, 2.0)
    for error in (3.0, float("nan")):
        with pytest.raises(ClaimBroken, match=f"distance: {error:.3g}\n  at: layer 1\n  bound: 2"):
            claim.at_most("distance", error, 2.0, layer=1)
