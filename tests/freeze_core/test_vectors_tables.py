"""A vector's frame and tables say of what they are, and LaTeX takes them."""

from __future__ import annotations

from pathlib import Path

import pytest
from discovered import METRIC, discover
from typesetting import typeset

from pytest_circuitfreeze.models import tiny_model


def test_tables_say_what_they_are_of() -> None:
    model = tiny_model("gpt2")
    made = discover(model, strengths=(1.0, -1.0), held_out=0.4, **METRIC)
    text = made.to_markdown()
    row, first, second = (line for line in text.splitlines() if line.startswith(("| mean_difference", "| 1 ", "| -1 ")))
    assert f"{made.separation.auc.value:.3g} [" in row
    assert f"{made.effects.rows[0].change.value:.3g} [" in first
    assert f"{made.effects.rows[1].difference.low:.3g}, " in second
    assert "GPT2LMHeadModel, a vector of the residual stream after layer 1, found on 6 positive and 6 negative" in text
    assert "n = 4 positive and 4 negative ones held out" in text
    assert "n = 4 prompts that it was not found on" in text
    assert "95 % expanded percentile bootstrap intervals over pairs" in text
    assert "change (logits)" in text
    frame = made.to_frame()
    assert list(frame.strength) == [1, -1]
    assert (frame.n_positive[0], frame.n_negative[0], frame.n[0]) == (4, 4, 4)
    assert (frame.n_found_positive[0], frame.n_found_negative[0]) == (6, 6)
    alone = discover(model)
    assert len(alone.to_frame()) == 1
    assert "strength" not in alone.to_markdown()


@pytest.mark.latex
def test_latex_is_typeset(tmp_path: Path) -> None:
    typeset(discover(tiny_model("gpt2"), **METRIC).to_latex(), tmp_path)
