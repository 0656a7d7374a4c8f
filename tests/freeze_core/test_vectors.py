"""Intervention vectors against code by hand, in a model where the answer is known, and judged on what was held out."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from intervals import expanded
from scipy import stats
from torch import Tensor, nn

from freeze_core import (
    ExperimentalInterventions,
    InterventionConfig,
    InterventionError,
    InterventionVector,
    measure_faithfulness,
    patch_activations,
    run_circuit_ablation_study,
)
from freeze_core.files import read_file, write_file
from freeze_core.vectors.effects import CONTROLS
from freeze_core.vectors.vector import FORMAT
from pytest_circuitfreeze.models import tiny_model

DEFAULT = ["gpt2", "llama", "mistral_gqa", "falcon_mqa"]
METHODS = ["mean_difference", "principal_component", "optimised"]
GENERATOR = torch.Generator().manual_seed(0)
POSITIVE, NEGATIVE = torch.randint(0, 60, (2, 10, 7), generator=GENERATOR)
MASK = (torch.arange(7) >= torch.arange(10)[:, None] % 5).long()
METRIC = {"metric": "logit_difference", "targets": (3, 4)}


def discover(model: Any, positive: Any = POSITIVE, negative: Any = NEGATIVE, *args: Any, **options: Any) -> Any:
    layer, *rest = args or (1,)
    if "optimised" in rest:
        options = {**METRIC, "steps": 5, **options}
    return ExperimentalInterventions().discover_intervention_vector(
        model, positive, negative, layer, *rest, **{"progress": False, "resamples": 999} | options
    )


def rows(size: int = 10, held_out: int = 5, seed: int = 0) -> tuple[list[int], list[int]]:
    """The rows to find a vector on, and those held out, as they are drawn."""
    drawn = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(drawn[held_out:]), sorted(drawn[:held_out])


def stream(model: Any, layer: int, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The residual stream at the last real token of each row, read one row at a time, in float64."""
    layers = next(one for one in model.modules() if isinstance(one, nn.ModuleList))
    found = []
    for row, one in enumerate(ids):
        real = one if mask is None else one[mask[row].bool()]
        with torch.no_grad():
            states = model(real[None], output_hidden_states=True).hidden_states
            if layer < len(layers) - 1:
                found.append(states[layer + 1][0, -1])
                continue
            before = states[-2]  # the last one is after the final norm
            seen: list[Tensor] = []
            norm = getattr(model.base_model, "norm", None) or model.base_model.ln_f
            hook = norm.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
            model(real[None])
            hook.remove()
            assert not torch.equal(before, seen[0])
            found.append(seen[0][0, -1])
    return torch.stack(found).double()


def rounding(values: Tensor) -> float:
    """float32 products of 32 features, four layers deep."""
    return float(32 * 4 * 2**-23 * values.abs().max())


@pytest.mark.parametrize("layer", [0, 1, 2, -1])
@pytest.mark.parametrize("architecture", DEFAULT)
def test_the_difference_of_means_is_that_by_hand(architecture: str, layer: int) -> None:
    model = tiny_model(architecture)
    made = discover(model, POSITIVE, NEGATIVE, layer)
    found, apart = rows()
    positive, negative = (stream(model, layer % 3, ids) for ids in (POSITIVE, NEGATIVE))
    expected = positive[found].mean(0) - negative[found].mean(0)
    torch.testing.assert_close(made.vector.double(), expected, rtol=0, atol=rounding(positive))
    assert made.layer == layer % 3
    assert made.found == (5, 5)
    unit = expected / expected.norm()
    for projected, states in zip(made.held_out, (positive, negative), strict=True):
        torch.testing.assert_close(projected, states[apart] @ unit, rtol=0, atol=32 * rounding(positive))
    lengths = torch.cat([positive[found], negative[found]]).norm(dim=1)
    assert made.typical_norm == pytest.approx(float(lengths.mean()), rel=1e-5)
    middle = (positive[found].mean(0) + negative[found].mean(0)) / 2 @ unit
    assert made.threshold == pytest.approx(float(middle), abs=1e-4)


@pytest.mark.parametrize("architecture", DEFAULT)
def test_the_last_real_token_is_read_under_padding(architecture: str) -> None:
    model = tiny_model(architecture)
    padded = {"input_ids": NEGATIVE, "attention_mask": MASK, "position_ids": (MASK.cumsum(1) - 1).clamp(min=0)}
    if architecture == "falcon_mqa":
        del padded["position_ids"]
    made = discover(model, POSITIVE, padded)
    found, _ = rows()
    expected = stream(model, 1, POSITIVE)[found].mean(0) - stream(model, 1, NEGATIVE, MASK)[found].mean(0)
    bound = rounding(stream(model, 1, POSITIVE)) if architecture != "falcon_mqa" else 1.0  # places are not told it
    torch.testing.assert_close(made.vector.double(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("positions", ["all", [0, 2], [-1]], ids=str)
def test_a_prompt_is_the_mean_over_its_positions(positions: Any) -> None:
    model = tiny_model("gpt2")
    columns = list(range(7)) if positions == "all" else positions
    with torch.no_grad():
        states = [model(ids, output_hidden_states=True).hidden_states[2].double() for ids in (POSITIVE, NEGATIVE)]
    positive, negative = (one[rows()[0]][:, columns].mean(1).mean(0) for one in states)
    made = discover(model, positions=positions)
    torch.testing.assert_close(made.vector.double(), positive - negative, rtol=0, atol=rounding(states[0]))


def test_padding_is_no_part_of_the_mean_over_all_positions() -> None:
    model = tiny_model("llama")
    padded = [{"input_ids": ids, "attention_mask": MASK} for ids in (POSITIVE, NEGATIVE)]
    other = [{**one, "input_ids": torch.where(MASK.bool(), one["input_ids"], 7)} for one in padded]
    assert torch.equal(
        discover(model, *padded, positions="all").vector, discover(model, *other, positions="all").vector
    )
    with pytest.raises(InterventionError, match=r"positions=\[1\]: one of them is padding in some prompt of positive"):
        discover(model, *padded, positions=[1])


def test_the_principal_component_is_that_of_differences_not_centred() -> None:
    model = tiny_model("mistral_gqa")
    made = discover(model, POSITIVE, NEGATIVE, 1, "principal_component")
    differences = (stream(model, 1, POSITIVE) - stream(model, 1, NEGATIVE))[rows()[0]]
    values, directions = np.linalg.eigh((differences.T @ differences).numpy())
    direction = torch.from_numpy(directions[:, -1].copy())
    expected = direction * (direction @ differences.mean(0))
    torch.testing.assert_close(made.vector.double(), expected, rtol=1e-3, atol=1e-3)
    assert values[-1] > 1.2 * values[-2]
    assert float((differences @ made.vector.double()).mean()) > 0  # positive prompts are on the positive side
    swapped = discover(model, NEGATIVE, POSITIVE, 1, "principal_component")
    torch.testing.assert_close(swapped.vector, -made.vector)


CONTRAST, SMALL = 2.0, 0.2
"""How far prompts of the two kinds are apart, each way, along what was planted, and the length of all else in them."""


def planted() -> tuple[Any, Tensor, Tensor, Tensor]:
    """A model whose stream is its embeddings, prompts of two kinds whose last tokens differ by a planted direction, and
    that direction; the logits of token 1 over token 0 are the stream along it.
    """
    model = tiny_model("llama")
    draws = torch.Generator().manual_seed(5)
    direction = nn.functional.normalize(torch.randn(32, generator=draws), dim=0)
    rest = nn.functional.normalize(torch.randn(97, 32, generator=draws), dim=1) * SMALL
    sign = torch.where(torch.arange(97) < 40, 1.0, -1.0)[:, None]
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                for parameter in projection.parameters():
                    parameter.zero_()
        model.model.embed_tokens.weight.copy_(rest + sign * CONTRAST * direction)
        model.lm_head.weight.zero_()
        model.lm_head.weight[1] = direction
    model.model.norm = nn.Identity()
    positive = torch.arange(20).view(20, 1) + torch.tensor([[0, 20]])
    return model, positive, positive + 40, direction


@pytest.mark.parametrize("method", METHODS)
def test_a_planted_direction_is_found(method: str) -> None:
    """Sines are bounded: of means by the lengths of what is planted and of all else; of the principal component by
    P. A. Wedin, "Perturbation bounds in connection with singular value decomposition", 1972; of the optimised one by
    its start, a tenth of the bound, since the gradient of a linear metric is along the planted direction alone.
    """
    model, positive, negative, direction = planted()
    options = {"metric": "logit_difference", "targets": (1, 0), "steps": 50} if method == "optimised" else METRIC
    made = discover(model, positive, negative, 1, method, **options)
    ratio = SMALL / CONTRAST
    sine = {"mean_difference": ratio, "principal_component": ratio / (1 - ratio), "optimised": 0.1}[method]
    cosine = float(nn.functional.cosine_similarity(made.vector, direction, dim=0))
    assert cosine > (1 - sine**2) ** 0.5
    assert made.separation.auc == made.separation.accuracy == (1, 1, 1)
    assert made.stability.low > 2 * (1 - sine**2) - 1  # each half is within that angle of it
    if method != "optimised":
        assert float(made.vector.norm()) == pytest.approx(2 * CONTRAST, abs=2 * SMALL)


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


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_left_as_it_was(method: str, context: Any) -> None:
    model = tiny_model("llama_gqa").train()
    wanted = [number % 2 == 0 for number, _ in enumerate(model.parameters())]
    for parameter, wants in zip(model.parameters(), wanted, strict=True):
        parameter.requires_grad_(wants)
        parameter.grad = torch.ones_like(parameter) if wants else None
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [(len(module._forward_hooks), "forward" in vars(module)) for module in model.modules()]
    flags, drawn = [module.training for module in model.modules()], torch.get_rng_state()
    with context():
        made = discover(model, POSITIVE, NEGATIVE, 1, method, **METRIC)
        assert torch.is_grad_enabled() == (context is torch.enable_grad)
    assert not made.vector.requires_grad
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None or bool((parameter.grad == 1).all()) for parameter in model.parameters())
    assert [(len(module._forward_hooks), "forward" in vars(module)) for module in model.modules()] == hooks
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(made.vector, discover(model, POSITIVE, NEGATIVE, 1, method, **METRIC).vector)


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


class Words:
    """A tokenizer whose words are numbers, and which pads on the left."""

    pad_token: str | None = "0"

    def __call__(self, texts: list[str], padding: bool, return_tensors: str) -> dict[str, Tensor]:
        several = [[int(word) for word in text.split()] for text in texts]
        width = max(map(len, several))
        ids = torch.tensor([[0] * (width - len(one)) + one for one in several])
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in several])
        return {"input_ids": ids, "attention_mask": mask}


def test_the_same_call_gives_the_same_and_another_seed_another_split() -> None:
    model = tiny_model("gpt2")
    one, again = (discover(model, **METRIC, strengths=(1.0, -2.0)) for _ in range(2))
    assert one.to_frame().equals(again.to_frame())
    other = discover(model, **METRIC, seed=1)
    assert not torch.equal(other.vector, one.vector)
    assert not torch.equal(other.effects.controls[0], one.effects.controls[0])


def test_prompts_in_batches_of_any_kind_are_the_same_prompts() -> None:
    model = tiny_model("gpt2")
    whole = discover(model)
    parts = discover(model, [POSITIVE[:3], POSITIVE[3:]], [{"input_ids": NEGATIVE[:8]}, NEGATIVE[8:]])
    torch.testing.assert_close(parts.vector, whole.vector, rtol=0, atol=rounding(whole.vector) * 8)
    for one, other in zip(parts.held_out, whole.held_out, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=rounding(whole.vector) * 32)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_vectors_are_found_in_other_dtypes(method: str, dtype: torch.dtype) -> None:
    made = discover(tiny_model("llama", dtype=dtype), POSITIVE, NEGATIVE, 1, method, **METRIC)
    assert made.vector.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert made.origin["dtype"] == str(dtype)


def test_a_vector_is_what_it_was_when_it_is_loaded(tmp_path: Path) -> None:
    model = tiny_model("mistral_gqa")
    for number, made in enumerate(
        (discover(model), discover(model, POSITIVE, NEGATIVE, 1, "optimised", strengths=(1.0, 2.0)))
    ):
        path = tmp_path / str(number)
        made.save(path)
        loaded = InterventionVector.load(path)
        assert torch.equal(loaded.vector, made.vector)
        assert loaded.to_frame().equals(made.to_frame())
        assert (loaded.to_markdown(), loaded.to_latex()) == (made.to_markdown(), made.to_latex())
        for field in ("layer", "method", "found", "prompts", "origin", "paired", "threshold", "typical_norm"):
            assert getattr(loaded, field) == getattr(made, field)
        for field in ("cosines", "losses"):
            assert torch.equal(getattr(loaded, field), getattr(made, field))
        with loaded.apply(model):
            steered = model(POSITIVE).logits
        with made.apply(model):
            assert torch.equal(model(POSITIVE).logits, steered)
    assert {field.name for field in fields(made)} == {
        *("vector", "layer", "method", "found", "typical_norm", "held_out", "threshold", "paired", "cosines"),
        *("losses", "effects", "prompts", "origin", "resampling"),
    }
    InterventionConfig().save(tmp_path / "config")
    for name, message in (("nowhere", "cannot be read"), ("config", "must be 'circuitfreeze-intervention-vector-1'")):
        with pytest.raises(InterventionError, match=f"intervention vector of .*{message}"):
            InterventionVector.load(tmp_path / name)


BAD = [
    ("threshold", "NaN"),
    ("threshold", '"x"'),
    ("threshold", "true"),
    ("typical_norm", "Infinity"),
    ("origin", "[" * 200_000),
]
"""Facts of a vector that no discovery writes, as text."""


@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        ("vector", torch.ones(2, 2)),
        ("vector", torch.tensor([1.0, float("nan")])),
        ("vector", torch.tensor([1, 2])),
        ("cosines", torch.tensor([float("inf")], dtype=torch.float64)),
        ("positive", torch.ones(3)),
        ("effects.controls", torch.ones(1, 8, 4, dtype=torch.float64)),
        ("effects.clean", torch.ones(4, dtype=torch.float64)),
    ],
)
def test_a_file_that_holds_something_else_is_refused(tmp_path: Path, tensor: str, value: Tensor) -> None:
    discover(tiny_model("gpt2"), **METRIC).save(tmp_path / "vector")
    tensors, facts = read_file(tmp_path / "vector", FORMAT, "intervention vector")
    del facts["format"]
    write_file(tmp_path / "vector", FORMAT, {**tensors, tensor: value}, facts)
    with pytest.raises(InterventionError, match="not what save writes"):
        InterventionVector.load(tmp_path / "vector")
    for fact, text in (("layer", '"one"'), ("origin", "{}"), ("effects", "3"), ("found", "null"), *BAD):
        write_file(tmp_path / "vector", FORMAT, tensors, {**facts, fact: text})
        with pytest.raises(InterventionError, match="not what save writes"):
            InterventionVector.load(tmp_path / "vector")


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
    assert (frame.n_positive[0], frame.n_found_negative[0], frame.n[0]) == (4, 6, 4)
    alone = discover(model)
    assert len(alone.to_frame()) == 1
    assert "strength" not in alone.to_markdown()


@pytest.mark.latex
def test_latex_is_typeset(tmp_path: Path) -> None:
    if shutil.which("pdflatex") is None:
        pytest.skip("pdflatex is not installed")
    body = discover(tiny_model("gpt2"), **METRIC).to_latex()
    text = f"\\documentclass{{article}}\\usepackage{{booktabs}}\\begin{{document}}\n{body}\\end{{document}}\n"
    (tmp_path / "table.tex").write_text(text, encoding="utf-8")
    subprocess.run(["pdflatex", "-halt-on-error", "table.tex"], cwd=tmp_path, check=True, capture_output=True)


FOUR = POSITIVE[:4]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"positive": torch.empty(0, 7, dtype=torch.long)}, r"positive is empty"),
        ({"negative": []}, r"negative is empty"),
        ({"positive": POSITIVE[:1]}, r"positive has 1 prompt: must have 4 at least, two to find a vector on"),
        ({"negative": NEGATIVE[:3]}, r"negative has 3 prompts: must have 4"),
        ({"positive": "glad"}, r"positive='glad': must be token ids"),
        ({"positive": 3}, r"positive=3: must be token ids"),
        ({"positive": ["1 2", "3"]}, r"tokenizer=None: must be the model's tokenizer, for positive of texts"),
        ({"tokenizer": Words()}, r"tokenizer: must be None for prompts of token ids"),
        (
            {"negative": NEGATIVE[:5], "method": "principal_component"},
            r"positive has 10 prompts and negative 5: must be",
        ),
        ({"positive": torch.cat([FOUR, FOUR])}, r"positive has a prompt several times"),
        ({"negative": torch.cat([NEGATIVE[:5], POSITIVE[3:5]])}, r"2 prompts are both positive and negative"),
        ({"negative": torch.cat([NEGATIVE[:9], POSITIVE[:1]])}, r"1 prompt is both positive and negative"),
        ({"positive": POSITIVE.float()}, r"inputs is torch.float32"),
        ({"layer": 3}, r"layer=3: must be an int in -3 to 2, of 3 layers"),
        ({"layer": -4}, r"layer=-4: must be"),
        ({"layer": True}, r"layer=True: must be"),
        ({"layer": 1.0}, r"layer=1.0: must be"),
        ({"method": "pca"}, r"method='pca': must be one of mean_difference, principal_component, optimised"),
        ({"method": "optimised"}, r"metric=None: must be given with method='optimised'"),
        ({"targets": (1, 2)}, r"targets: must be None without a metric"),
        ({"metric": "accuracy"}, r"metric='accuracy': must be a callable or one of"),
        ({"metric": "logit_difference"}, r"targets=None: metric='logit_difference' takes two"),
        ({"metric": "logit_difference", "targets": (1, 97)}, r"targets=\(1, 97\): must be ids in 0 to 96"),
        ({"metric": "probability", "targets": [1, 2, 3]}, r"targets=\[1, 2, 3\]: must be those of one prompt for all"),
        ({**METRIC, "strengths": []}, r"strengths=\[\]: must be a list of finite numbers"),
        ({**METRIC, "strengths": [1.0, float("nan")]}, r"strengths=nan: must be a finite number"),
        ({**METRIC, "strengths": [1, 1.0]}, r"strengths=\[1, 1.0\]: names the same one twice"),
        ({**METRIC, "strengths": 2.0}, r"strengths=2.0: must be a list"),
        ({"max_norm": 1.0}, r"max_norm=1.0: must be None with method='mean_difference'"),
        ({"steps": 3}, r"steps=3: must be None with method='mean_difference'"),
        ({"method": "optimised", **METRIC, "max_norm": 0.0}, r"max_norm=0.0: must be None or a finite number over 0"),
        ({"method": "optimised", **METRIC, "steps": 0}, r"steps=0: must be None or an int of 1 at least"),
        ({"held_out": 0.0}, r"held_out=0.0: must be the share"),
        ({"held_out": 1}, r"held_out=1: must be the share"),
        ({"held_out": float("nan")}, r"held_out=nan: must be the share"),
        ({"seed": -1}, r"seed=-1: must be an int of 0 at least"),
        ({"seed": True}, r"seed=True: must be"),
        ({"batch_size": 0}, r"batch_size=0: must be an int of 1 at least"),
        ({"progress": 1}, r"progress=1: must be True or False"),
        ({"positions": [7]}, r"positions=\[7\]: 7 is out of range"),
        ({"positions": "first"}, r"positions='first': must be"),
        ({"apply_positions": "first"}, r"positions='first': must be 'all', 'last', a list"),
        ({**METRIC, "metric_positions": [9]}, r"positions=\[9\]: 9 is out of range"),
        ({**METRIC, "apply_positions": [0, 50]}, r"positions=\(0, 50\): 50 is out of range"),
        ({**METRIC, "apply_positions": [0, -7]}, r"positions=\(0, -7\): names the same of 7 columns twice"),
        (
            {**METRIC, "negative": {"input_ids": NEGATIVE, "attention_mask": MASK}, "apply_positions": [0]},
            r"positions=\(0,\): one of them is padding in some prompt of negative",
        ),
        ({"confidence": 2.0}, r"confidence=2.0: must be"),
        ({"resamples": 1}, r"resamples=1: must be"),
    ],
)
def test_what_cannot_be_served_is_an_error_before_any_pass(given: dict[str, Any], message: str) -> None:
    model = tiny_model("llama")
    own = model.forward
    model.forward = lambda *args, **kwargs: pytest.fail("the model was run")
    model.forward.__func__ = own.__func__  # type: ignore[attr-defined]
    asked = {"positive": POSITIVE, "negative": NEGATIVE, "layer": 1, "method": "mean_difference", "progress": False}
    with pytest.raises(InterventionError, match=message):
        ExperimentalInterventions().discover_intervention_vector(model, **{**asked, **given})


@pytest.mark.parametrize("module", ["ablation", "patching", "faithfulness", "discovery"])
def test_what_a_result_is_of_is_found_out_before_any_pass(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    own = model.forward
    model.forward = lambda *args, **kwargs: pytest.fail("the model was run")
    model.forward.__func__ = own.__func__  # type: ignore[attr-defined]
    package = "vectors" if module == "discovery" else "studies"

    def failing(*args: Any) -> None:
        raise LookupError("no version")

    monkeypatch.setattr(f"freeze_core.{package}.{module}.origin_of", failing)
    calls: dict[str, Any] = {
        "ablation": lambda: run_circuit_ablation_study(model, NEGATIVE, [0], [0], progress=False),
        "patching": lambda: patch_activations(model, POSITIVE, NEGATIVE, **METRIC, progress=False),
        "faithfulness": lambda: measure_faithfulness(model, NEGATIVE, {0: [0]}, **METRIC, progress=False),
        "discovery": lambda: discover(model),
    }
    with pytest.raises(LookupError, match="no version"):
        calls[module]()


def test_texts_of_unequal_length_need_a_pad_token() -> None:
    tokenizer = Words()
    tokenizer.pad_token = None
    with pytest.raises(InterventionError, match="tokenizer has no pad_token"):
        discover(tiny_model("llama"), ["1 2", "3", "4", "5"], ["6", "7", "8", "9"], tokenizer=tokenizer)
    with pytest.raises(InterventionError, match=r"text 1 of negative, '', makes 0 tokens: must make one at least"):
        discover(tiny_model("llama"), ["1 2", "3", "4", "5"], ["6", "", "8", "9"], tokenizer=Words())


def test_prompts_that_do_not_differ_have_no_vector() -> None:
    model = tiny_model("llama")
    alike = torch.cat([POSITIVE[:, :1], NEGATIVE[:, 1:]], dim=1)
    with pytest.raises(InterventionError, match="found a vector that is 0 or not finite"):
        discover(model, POSITIVE, alike, positions=[0])
    with pytest.raises(InterventionError, match="it has no positive side"):
        discover(model, POSITIVE, alike, 1, "principal_component", positions=[0])


def test_a_metric_without_a_gradient_is_refused_by_name() -> None:
    def likeliest(logits: Tensor) -> Tensor:
        return logits[:, -1].argmax(-1).double()

    model = tiny_model("llama")
    with pytest.raises(InterventionError, match="metric=logit_difference does not depend on the vector at all"):
        discover(model, POSITIVE, NEGATIVE, 1, "optimised", apply_positions="last", metric_positions=[3])
    with pytest.raises(InterventionError, match="metric=likeliest has no gradient with respect to the vector"):
        discover(model, POSITIVE, NEGATIVE, 1, "optimised", metric=likeliest, targets=None)
    assert not any("forward" in vars(module) for module in model.modules())
