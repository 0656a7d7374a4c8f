"""Bounds that come from nudges hold what rounding does, and little more."""

from __future__ import annotations

import pytest
import torch
from by_heart import BY_HEART

from pytest_circuitfreeze.models import tiny_model
from pytest_circuitfreeze.suites.judge.rounding import NudgedAttention
from pytest_circuitfreeze.suites.tolerance import Nudge, gamma, nudged

IDS = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(0))


def test_gamma_is_six_deviations_of_a_sum_of_rounding_errors() -> None:
    assert gamma(1, torch.float32) == 6 * 2**-24
    assert gamma(16, torch.float64) == 24 * 2**-53


def test_nudge_moves_every_element_by_gamma_and_alike_each_time() -> None:
    exact = torch.linspace(1, 2, 100, dtype=torch.float64)
    moved = Nudge(torch.float32)(exact, 4)
    assert torch.allclose((moved / exact - 1).abs(), torch.full_like(exact, gamma(4, torch.float32)), rtol=1e-6)
    assert 20 < (moved > exact).sum() < 80
    assert torch.equal(moved, Nudge(torch.float32)(exact, 4))


@pytest.mark.parametrize("terms", [8, 64, 1024])
def test_nudged_operands_bound_the_rounding_of_a_product(terms: int) -> None:
    generator = torch.Generator().manual_seed(terms)
    left, right = (torch.randn(50, terms, generator=generator) for _ in range(2))
    exact = left.double() @ right.double().T
    error = (left @ right.T - exact).abs().max()
    bound = (left.double() @ Nudge(torch.float32)(right.double(), terms).T - exact).abs().max()
    assert error < bound < 1000 * error


@pytest.mark.parametrize("name", BY_HEART)
def test_nudged_model_bounds_float32_against_float64(name: str) -> None:
    small = tiny_model(name)
    with torch.no_grad():
        got, moved = small(IDS).logits, nudged(small)(IDS).logits
        want = tiny_model(name).double()(IDS).logits  # the same float32 weights, and wider arithmetic
    error, bound = (got - want).abs().max(), (moved - got).abs().max()
    assert error < bound < 300 * error


def test_nudged_copy_is_made_once_and_leaves_the_model() -> None:
    model = tiny_model("gpt2")
    before = [parameter.clone() for parameter in model.parameters()]
    assert nudged(model) is nudged(model)
    for old, new, copied in zip(before, model.parameters(), nudged(model).parameters(), strict=True):
        assert torch.equal(old, new)
        assert not torch.equal(new, copied)
    assert nudged(tiny_model("gpt2")) is not nudged(model)


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "mistral_gqa", "falcon_mqa"])
def test_nudged_attention_computes_the_same_and_moves_gradients_that_cancel(name: str) -> None:
    model = tiny_model(name, dtype=torch.float64)
    mask = torch.tensor([[0] * 11 + [1], [1] * 12])  # the only token of the first row has no choice where to look
    results = []
    for mode in (None, NudgedAttention()):
        model.zero_grad()
        with mode or torch.enable_grad():
            logits = model(IDS, attention_mask=mask).logits[mask.bool()]
            logits.square().sum().backward()
        results.append((logits, [parameter.grad.clone() for parameter in model.parameters()]))
    (plain, grads), (apart, moved) = results
    assert (plain - apart).abs().max() < 1e-6  # norms are taken in float32 in some families
    assert not all(torch.equal(one, other) for one, other in zip(grads, moved, strict=True))


def test_nudged_attention_bounds_the_gradient_of_a_lone_token_whatever_its_values_are() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = torch.randn(4, 500, 1, 1, 8, generator=generator)  # 500 sequences of one token
    value[..., -1:] -= (value * grad).sum(-1, keepdim=True) / grad[..., -1:]  # the pattern's gradient cancels too
    found = []
    for mode in (torch.enable_grad(), NudgedAttention()):
        query.grad = None
        with mode:
            torch.nn.functional.scaled_dot_product_attention(query.requires_grad_(), key, value).backward(grad)
        found.append(query.grad.abs().amax((1, 2, 3)))
    error, bound = found
    assert error.any()  # there is none in exact arithmetic
    assert (error <= bound).all()


def test_nudge_covers_what_is_lost_below_the_smallest_number_and_leaves_zero_alone() -> None:
    tiny = torch.tensor([1e-60, 0.0], dtype=torch.float64)
    moved = Nudge(torch.float32)(tiny)
    assert float((moved - tiny)[0].abs()) >= float((tiny.float() - tiny)[0].abs()) > 0
    assert moved[1] == 0
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert Nudge(dtype)(tiny.to(dtype)).dtype == dtype
