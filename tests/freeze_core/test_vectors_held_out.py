"""How good a vector is, judged on what it was not found on, against code by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from discovered import DEFAULT, METHODS, METRIC, NEGATIVE, POSITIVE, Words, discover, rounding, rows, stream
from intervals import expanded
from scipy import stats
from torch import Tensor, nn

from freeze_core import InterventionError
from freeze_core.vectors.effects import CONTROLS
from pytest_circuitfreeze.models import tiny_model


@pytest.mark.parametrize("method", METHODS)
def test_held_out_prompts_never_touch_the_vector(method: str) -> None:
    model = tiny_model("falcon_mqa")
    _, apart = rows()
    positive, negative = POSITIVE.clone(), NEGATIVE.clone()
    positive[apart], negative[apart] = (positive[apart] + 11) % 60, (negative[apart] + 23) % 60
    one, other = (
        discover(model, *prompts, 1, method, **METRIC) for prompts in ((POSITIVE, NEGATIVE), (positive, negative))
    )
    assert torch.equal(one.vector, other.vector)
    assert torch.equal(one.cosines, other.cosines)
    assert torch.equal(one.losses, other.losses)
    assert one.threshold == other.threshold
    assert not torch.equal(one.held_out[0], other.held_out[0])
    assert not torch.equal(one.effects.clean, other.effects.clean)
    found, _ = rows()
    positive = POSITIVE.clone()
    positive[found[0]] = (positive[found[0]] + 11) % 60
    if method != "optimised":  # which is found on negative ones
        assert not torch.equal(discover(model, positive, NEGATIVE, 1, method).vector, one.vector)


def test_texts_are_padded_without_those_held_out() -> None:
    """A long text among those held out would change the padding of the others, and with it their last bits."""
    model, tokenizer = tiny_model("llama"), Words()
    texts = [" ".join(map(str, row.tolist())) for row in POSITIVE]
    others = [" ".join(map(str, row.tolist())) for row in NEGATIVE]
    long = [f"{text} 5 6 7 8" if row in rows()[1] else text for row, text in enumerate(texts)]
    made = discover(model, texts, others, tokenizer=tokenizer)
    assert torch.equal(made.vector, discover(model, long, others, tokenizer=tokenizer).vector)
    torch.testing.assert_close(made.vector, discover(model).vector, rtol=0, atol=rounding(made.vector) * 8)


def test_kinds_of_unequal_number_are_no_pairs() -> None:
    made = discover(tiny_model("gpt2"), POSITIVE, NEGATIVE[:7], held_out=0.3)
    assert (made.found, [len(one) for one in made.held_out], made.paired) == ((7, 5), [3, 2], False)
    made.held_out[0].copy_(torch.tensor([1.0, 2, 3]))
    made.held_out[1].copy_(torch.tensor([2.0, 0]))
    assert made.separation.auc.value == pytest.approx((1 + 1 + 1 + 0 + 0.5 + 1) / 6)


def test_separation_is_that_of_scipy_and_draws_pairs_together() -> None:
    made = discover(tiny_model("llama"), resamples=500, confidence=0.8, resampling_seed=3)
    positive, negative = (one.numpy() for one in made.held_out)
    auc = stats.mannwhitneyu(positive, negative).statistic / 25
    assert made.separation.auc.value == pytest.approx(auc)
    correct = (np.mean(positive > made.threshold) + np.mean(negative < made.threshold)) / 2
    assert made.separation.accuracy.value == pytest.approx(correct)
    draws = np.random.default_rng(3).integers(0, 5, (500, 5))  # as scipy draws them
    drawn = [np.mean(positive[one][:, None] > negative[one]) for one in draws]
    assert made.separation.auc[1:] == pytest.approx(expanded(drawn, 0.8, 5))


def test_stability_is_the_cosine_of_halves() -> None:
    model = tiny_model("gpt2")
    made = discover(model)
    differences = (stream(model, 1, POSITIVE) - stream(model, 1, NEGATIVE))[rows()[0]]
    generator = torch.Generator().manual_seed(0)
    cosines = []
    for _ in range(100):
        drawn = torch.randperm(5, generator=generator)
        one, other = differences[drawn[:3]].mean(0), differences[drawn[3:]].mean(0)
        cosines.append(float(one @ other / one.norm() / other.norm()))
    assert made.cosines.tolist() == pytest.approx(cosines, abs=1e-4)
    assert made.stability == pytest.approx((np.mean(cosines), *np.quantile(cosines, [0.025, 0.975]), 100), abs=1e-4)


@pytest.mark.parametrize("architecture", DEFAULT)
def test_effects_are_those_of_a_loop_by_hand(architecture: str) -> None:
    model = tiny_model(architecture)
    targets = torch.stack([torch.arange(10), torch.arange(10) + 20], dim=1)  # each prompt's own
    made = discover(model, metric="logit_difference", targets=targets, strengths=(0.0, 2.0), apply_positions=[0, 6])
    effects, apart = made.effects, rows()[1]

    def values(vector: Tensor | None) -> list[float]:
        found = []
        layers = next(one for one in model.modules() if isinstance(one, nn.ModuleList))
        for row in apart:

            def hook(module: Any, args: Any, output: Any) -> Any:
                states = (output[0] if isinstance(output, tuple) else output).clone()
                states[:, [0, 6]] += 0 if vector is None else vector
                return (states, *output[1:]) if isinstance(output, tuple) else states

            handle = layers[1].register_forward_hook(hook)
            with torch.no_grad():
                logits = model(NEGATIVE[row : row + 1]).logits[0, -1].double()
            handle.remove()
            found.append(float(logits[row] - logits[row + 20]))
        return found

    clean, steered = values(None), values(2 * made.vector)
    assert effects.clean.tolist() == pytest.approx(clean, abs=1e-3)
    assert effects.steered[1].tolist() == pytest.approx(steered, abs=1e-3)
    assert torch.equal(effects.steered[0], effects.clean)
    assert torch.equal(effects.controls[0], effects.clean.expand(CONTROLS, -1))
    drawn = torch.randn(CONTROLS, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    control = drawn[3] / drawn[3].norm() * made.vector.double().norm()
    assert effects.controls[1, 3].tolist() == pytest.approx(values(2 * control.float()), abs=1e-3)
    nothing, row = effects.rows
    assert (nothing.change, nothing.difference, nothing.p_value) == ((0, 0, 0), (0, 0, 0), 1)
    changes = effects.steered[1] - effects.clean
    controls = (effects.controls[1] - effects.clean).mean(0)
    assert row.change.value == pytest.approx(float(changes.mean()))
    assert row.difference.value == pytest.approx(float((changes - controls).mean()))
    assert row.difference.low <= row.difference.value <= row.difference.high
    means = (effects.controls[1] - effects.clean).mean(1)
    assert abs(row.control_largest) == pytest.approx(float(means.abs().max()))
    signs = np.array(np.meshgrid(*[[1, -1]] * 5)).reshape(5, -1)
    shuffled = (changes - controls).numpy() @ signs / 5
    expected = 2 * min(np.mean(shuffled >= shuffled[0] - 1e-9), np.mean(shuffled <= shuffled[0] + 1e-9))
    assert row.p_value == pytest.approx(expected)


def test_a_vector_is_evaluated_on_other_prompts_at_other_strengths() -> None:
    model = tiny_model("llama")
    made = discover(model, strengths=(1.0,), **METRIC)
    _, apart = rows()
    again = made.evaluate(model, NEGATIVE[apart], strengths=(1.0, 3), progress=False, **METRIC)
    assert torch.equal(again.clean, made.effects.clean)
    assert torch.equal(again.steered[0], made.effects.steered[0])
    assert torch.equal(again.controls[0], made.effects.controls[0])
    frame = again.to_frame()
    assert list(frame.strength) == [1, 3]
    assert set(frame.n) == {5}
    assert set(frame.controls) == {CONTROLS}
    own = made.evaluate(model, NEGATIVE[apart], lambda logits: logits[:, 0, 3] - logits[:, 0, 4], progress=False)
    assert own.steered[0].tolist() == pytest.approx(again.steered[0].tolist(), abs=1e-6)
    found, _ = rows()
    with pytest.raises(InterventionError, match="prompt 1 of prompts is one that the vector was found on"):
        made.evaluate(model, NEGATIVE[[apart[0], found[0]]], progress=False, **METRIC)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), POSITIVE[[found[2], apart[0]]]], dim=1)
    given = {"input_ids": padded, "attention_mask": (torch.arange(10) > 2).long().expand(2, -1)}
    with pytest.raises(InterventionError, match="prompt 0 of prompts is one that the vector was found on"):
        made.evaluate(model, given, progress=False, **METRIC)
    with pytest.raises(InterventionError, match="7 is out of range; a batch has 7 columns"):
        made.evaluate(model, NEGATIVE[apart], positions=[7], progress=False, **METRIC)
    with pytest.raises(InterventionError, match="prompts has one prompt"):
        made.evaluate(model, NEGATIVE[apart[:1]], progress=False, **METRIC)


def test_dropout_is_the_same_with_and_without_the_vector() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=32)).train()
    torch.manual_seed(1)
    made = discover(model, strengths=(0.0,), **METRIC)
    assert torch.equal(made.effects.steered[0], made.effects.clean)
    assert torch.equal(made.effects.controls[0, 0], made.effects.clean)
