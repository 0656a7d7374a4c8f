"""Replacement values and gradients as functions of tensors, against numpy and against their definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from freeze_core.freezing.backward import blend
from freeze_core.freezing.draws import NoiseTable
from freeze_core.freezing.replacements import statistics_of
from freeze_core.vocabulary import BackwardMode


def test_statistics_leave_padding_out_and_are_of_the_population():
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    real = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    x[~real] = torch.nan
    mean, deviation = statistics_of(x, real)
    samples = x[real].double().numpy()
    np.testing.assert_allclose(mean, samples.mean(0), atol=1e-6)
    np.testing.assert_allclose(deviation, samples.std(0), atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "accumulated"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_statistics_are_accumulated_in_float32_or_better(dtype, accumulated):
    x = torch.full((4, 64, 2), 3000.0, dtype=dtype, requires_grad=True)  # sums and squares overflow float16
    mean, deviation = statistics_of(x, None)
    assert mean.dtype == accumulated
    assert not mean.requires_grad
    assert mean.tolist() == [x[0, 0, 0].item()] * 2
    assert deviation.tolist() == [0.0, 0.0]


def like(dtype=torch.float64):
    return torch.empty(0, dtype=dtype)


def test_a_draw_depends_on_its_column_alone_however_the_columns_are_asked_for():
    table = NoiseTable((3, 1, 1), heads=2, features=3)
    whole = table.columns(0, 9, like())
    fresh = NoiseTable((3, 1, 1), heads=2, features=3)
    stepwise = torch.cat([fresh.columns(0, 4, like()), *(fresh.columns(c, 1, like()) for c in range(4, 9))])
    assert torch.equal(whole, stepwise)
    assert torch.equal(whole.float(), table.columns(0, 9, like(torch.float32)))


def test_seed_layer_role_column_head_and_feature_all_matter():
    def draw(seed=0, layer=0, role=0):
        return NoiseTable((seed, layer, role), heads=3, features=4).columns(0, 5, like())

    draws = [draw(), draw(seed=1), draw(seed=-1), draw(seed=2**70), draw(layer=1), draw(role=1), draw(role=2)]
    values = torch.stack(draws).flatten()
    assert len(values.unique()) == len(values)


def test_draws_are_standard_normal_and_leave_torchs_generator_alone():
    state = torch.get_rng_state()
    sample = NoiseTable((5, 0, 2), heads=8, features=16).columns(0, 256, like()).flatten()
    assert torch.equal(state, torch.get_rng_state())
    n = len(sample)
    assert abs(sample.mean()) < 5 / n**0.5  # five standard errors
    assert abs(sample.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs(sample.pow(4).mean() - 3) < 5 * (96 / n) ** 0.5


MASK = torch.tensor([True, False, True, False])


@pytest.mark.parametrize("mode", [BackwardMode.STOPGRAD, BackwardMode.STE])
@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_blend_is_the_definition_and_its_gradient_the_estimators(mode, strength):
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    r = torch.randn(4, dtype=torch.float64)
    frozen = blend(x, x, MASK, r, strength, mode)
    expected = torch.where(MASK, x + strength * (r - x), x)
    torch.testing.assert_close(frozen, expected, rtol=1e-15, atol=1e-15)
    assert torch.equal(frozen[..., ~MASK], x[..., ~MASK])
    upstream = torch.randn_like(frozen)
    (dx,) = torch.autograd.grad(frozen, x, upstream)
    factor = torch.where(MASK, 1 - strength, 1.0) if mode == BackwardMode.STOPGRAD else torch.ones(4)
    torch.testing.assert_close(dx, upstream * factor, rtol=1e-15, atol=0)


@pytest.mark.parametrize("mode", [BackwardMode.STOPGRAD, BackwardMode.STE])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_at_full_strength_the_result_is_the_replacement_whatever_the_activation_is(mode, bad):
    x = torch.full((1, 2, 4), bad, requires_grad=True)
    frozen = blend(x, x, MASK, torch.tensor(0.1, dtype=torch.float64), 1.0, mode)
    assert frozen.dtype == torch.float32
    assert frozen[..., MASK].unique().tolist() == [torch.tensor(0.1).item()]
    frozen[..., MASK].sum().backward()
    assert torch.isfinite(x.grad).all()


def test_near_full_strength_the_gradient_keeps_its_digits():
    """1 - a is taken before it is rounded: g - a * g would lose all but a few digits of it."""
    x = torch.ones(1, 1, 4, requires_grad=True)
    blend(x, x, MASK, torch.zeros(()), 1 - 1e-5, BackwardMode.STOPGRAD).sum().backward()
    torch.testing.assert_close(x.grad[..., MASK], torch.full((1, 1, 2), 1e-5), rtol=1e-6, atol=0)
