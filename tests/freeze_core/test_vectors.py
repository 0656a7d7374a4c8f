"""Intervention vectors against code by hand, and in a model where the answer is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from discovered import DEFAULT, MASK, METHODS, METRIC, NEGATIVE, POSITIVE, discover, rounding, rows, stream
from torch import Tensor, nn

from freeze_core import InterventionError
from pytest_circuitfreeze.models import tiny_model


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_vectors_are_found_in_other_dtypes(method: str, dtype: torch.dtype) -> None:
    made = discover(tiny_model("llama", dtype=dtype), POSITIVE, NEGATIVE, 1, method, **METRIC)
    assert made.vector.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert made.origin["dtype"] == str(dtype)
