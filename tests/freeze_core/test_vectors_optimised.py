"""Vectors found by the gradient of a metric: they move it, and one without a gradient is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from discovered import DEFAULT, NEGATIVE, POSITIVE, discover, rows
from torch import Tensor

from freeze_core import InterventionError
from freeze_core.vectors.effects import CONTROLS
from pytest_circuitfreeze.models import tiny_model


def test_the_optimised_vector_moves_its_metric_more_than_random_ones() -> None:
    for architecture in DEFAULT:
        model = tiny_model(architecture)
        made = discover(model, POSITIVE, NEGATIVE, 1, "optimised", steps=25, apply_positions="last")
        (row,) = made.effects.rows
        assert row.difference.low > 0
        assert row.change.value > abs(row.control_largest)
        assert len(made.losses) == 26
        assert float(made.losses.min()) < float(made.losses[0]) - 1


def test_losses_are_the_metric_on_what_the_vector_was_found_on() -> None:
    model = tiny_model("llama")
    found, _ = rows()
    for metric, sign in (("logit_difference", -1), ("loss", 1)):
        targets = (3, 4) if metric == "logit_difference" else 3
        made = discover(model, POSITIVE, NEGATIVE, 1, "optimised", metric=metric, targets=targets, max_norm=2.0)
        assert float(made.vector.norm()) <= 2 * (1 + 2**-20)
        with made.apply(model), torch.no_grad():
            logits = model(NEGATIVE[found]).logits[:, -1].double()
        values = -logits.log_softmax(-1)[:, 3] if metric == "loss" else logits[:, 3] - logits[:, 4]
        assert float(made.losses.min()) == pytest.approx(
            sign * float(values.mean()), rel=1e-5
        )  # the best that was seen


def test_starts_are_no_controls_and_not_the_same_for_both_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    drawn: list[Tensor] = []
    own = torch.randn

    def kept(*args: Any, **options: Any) -> Tensor:
        made = own(*args, **options)
        if "generator" in options:
            drawn.extend(made.view(-1, made.shape[-1]))
        return made

    monkeypatch.setattr(torch, "randn", kept)
    discover(model, POSITIVE, NEGATIVE, 1, "optimised", steps=1)
    assert len(drawn) == 3 + CONTROLS  # whole, halves, controls
    directions = torch.nn.functional.normalize(torch.stack(drawn), dim=1)
    cosines = (directions @ directions.T - torch.eye(len(drawn))).abs()
    assert float(cosines.max()) < 0.9  # of 32 features: six times the deviation of a cosine of what is independent


def test_the_best_vector_that_was_seen_is_kept() -> None:
    """One step, of more than twice the bound, leads from a start near the best vector, 0, to the ball's other side."""
    model = tiny_model("llama")
    with torch.no_grad():
        clean = model(NEGATIVE).logits[:, -1]

    def likeness(logits: Tensor, inputs: Tensor) -> Tensor:
        rows = (inputs[:, None] == NEGATIVE).all(-1).int().argmax(1)
        return -(logits[:, -1] - clean[rows]).square().sum(-1)

    options = {"metric": likeness, "targets": None, "max_norm": 3.0, "steps": 1}
    made = discover(model, POSITIVE, NEGATIVE, 1, "optimised", **options)
    assert made.losses[0] < made.losses[1]
    assert float(made.vector.norm()) == pytest.approx(0.3)
    other = discover(model, POSITIVE, NEGATIVE, 1, "optimised", **options, seed=1)
    assert not torch.equal(other.vector, made.vector)


def test_a_metric_without_a_gradient_is_refused_by_name() -> None:
    def likeliest(logits: Tensor) -> Tensor:
        return logits[:, -1].argmax(-1).double()

    model = tiny_model("llama")
    with pytest.raises(InterventionError, match="metric=logit_difference does not depend on the vector at all"):
        discover(model, POSITIVE, NEGATIVE, 1, "optimised", apply_positions="last", metric_positions=[3])
    with pytest.raises(InterventionError, match="metric=likeliest has no gradient with respect to the vector"):
        discover(model, POSITIVE, NEGATIVE, 1, "optimised", metric=likeliest, targets=None)
    assert not any("forward" in vars(module) for module in model.modules())
