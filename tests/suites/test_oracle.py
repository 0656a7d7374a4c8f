"""The oracle against clean models, and freeze_core against the oracle, in float64, to the last digits."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from by_heart import BY_HEART
from torch import Tensor
from transformers import PreTrainedModel

from freeze_core import InterventionConfig
from pytest_circuitfreeze.engines import FreezeCore
from pytest_circuitfreeze.models import tiny_model
from pytest_circuitfreeze.recordings import calibrated, recorded
from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.judge.expected_replacements import material_of
from pytest_circuitfreeze.suites.judge.judged_sites import ROLES, CannotJudge
from pytest_circuitfreeze.suites.judge.known_families import known_sites
from pytest_circuitfreeze.suites.judge.observed_passes import Pass, run_pass
from pytest_circuitfreeze.suites.judge.oracle import due
from pytest_circuitfreeze.suites.judge.site_lookup import sites

IDS = torch.tensor([[7, 3, 11, 5, 2, 13, 17, 1], [4, 19, 6, 23, 8, 29, 10, 31]])
PADDED = Batch(IDS, torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]]))
WHOLE = Batch(IDS)
OTHER = Batch((IDS + 11) % 31, PADDED.attention_mask)
CIRCUITS = ["qk", "ov", "both", "q", "k", "v"]
FREEZES: list[dict[str, Any]] = [
    {"freeze_type": "zero"},
    {"freeze_type": "mean", "strength": 0.3},
    {"freeze_type": "noise", "seed": 4},
    {"freeze_type": "noise", "noise_std": 1.5, "seed": -1},
]

# What transformers computes in float32 even where a model is float64; all the rest is float64.
IN_FLOAT32 = {
    "eager softmax": ["opt", "llama", "llama_gqa", "llama_70b", "mistral_gqa", "phi3"],
    "rotary tables": BY_HEART[2:],
}


@cache
def model(name: str) -> PreTrainedModel:
    return tiny_model(name, dtype=torch.float64)


def relative_error(
    found: Pass, name: str, batch: Batch, configs: list[InterventionConfig], material: Any = None
) -> float:
    """The largest error of any z of a real token, in units of the largest z of its layer."""
    worst = 0.0
    for layer, site in sites(model(name)).items():
        want = due(site, found.layers[layer], batch.real, configs, material).z[batch.real]
        error = (found.layers[layer].mixed()[batch.real] - want).abs().max()
        worst = max(worst, float(error / want.abs().max()))
    return worst


@pytest.mark.parametrize("scope", ["group", "head"])
@pytest.mark.parametrize("circuit", CIRCUITS)
@pytest.mark.parametrize("name", BY_HEART)
def test_frozen_model_agrees_to_1e_9(name: str, circuit: str, scope: str) -> None:
    engine = FreezeCore()
    for fields in FREEZES:
        config = InterventionConfig(
            layer_indices=[0, 2], head_indices=[0, 3], circuit=circuit, kv_scope=scope, **fields
        )
        material = material_of(engine, model(name), [config], PADDED)
        found = run_pass(engine, model(name), config, PADDED)
        assert relative_error(found, name, PADDED, [config], material) < 1e-9


@pytest.mark.parametrize("scope", ["group", "head"])
@pytest.mark.parametrize("name", BY_HEART)
def test_model_frozen_to_what_lies_elsewhere_agrees_to_1e_9(name: str, scope: str) -> None:
    engine, small = FreezeCore(), model(name)
    held, one = recorded(small, OTHER), recorded(small, Batch(OTHER.input_ids[:1]))
    statistics = calibrated(small, [OTHER, Batch(IDS[:, :3])])
    freezes: list[tuple[Batch, dict[str, Any]]] = [
        (PADDED, {"freeze_type": "reference", "reference": held, "strength": 0.3}),
        (WHOLE, {"freeze_type": "reference", "reference": one}),
        (WHOLE, {"freeze_type": "resample", "seed": 2}),
        (PADDED, {"freeze_type": "mean", "statistics": statistics}),
        (PADDED, {"freeze_type": "noise", "statistics": statistics, "seed": 7}),
    ]
    for batch, fields in freezes:
        config = InterventionConfig(layer_indices=[0, 2], head_indices=[0, 3], kv_scope=scope, **fields)
        material = material_of(engine, small, [config], batch)
        assert relative_error(run_pass(engine, small, config, batch), name, batch, [config], material) < 1e-9


@pytest.mark.parametrize("name", BY_HEART)
def test_clean_model_agrees_to_1e_9(name: str) -> None:
    assert relative_error(run_pass(FreezeCore(), model(name), None, PADDED), name, PADDED, []) < 1e-9


@pytest.mark.parametrize("name", BY_HEART)
def test_eager_agrees_but_for_a_float32_softmax(name: str) -> None:
    error = relative_error(run_pass(FreezeCore(), model(name), None, WHOLE, attn="eager"), name, WHOLE, [])
    assert error < (1e-6 if name in IN_FLOAT32["eager softmax"] else 1e-9)


@pytest.mark.parametrize("name", IN_FLOAT32["rotary tables"])
def test_own_rotary_tables_agree_but_for_float32_ones(name: str) -> None:
    found = run_pass(FreezeCore(), model(name), None, PADDED)
    config: Any = model(name).config
    for layer, seen in found.layers.items():
        positions, formula = PADDED.arguments(model(name))["position_ids"], sites(model(name))[layer].formula
        assert formula is not None
        seen.call.kwargs["position_embeddings"] = rotary_tables(
            positions, config.rope_parameters["rope_theta"], formula.head_dim
        )
    assert 0 < relative_error(found, name, PADDED, []) < 1e-6


def rotary_tables(positions: Tensor, theta: float, features: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[batch, token, feature]` in float64 all through."""
    frequency = theta ** (-torch.arange(0, features, 2, dtype=torch.float64) / features)
    angle = (positions[..., None] * frequency).repeat(1, 1, 2)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("name", BY_HEART)
def test_patterns_are_the_models_own(name: str) -> None:
    small = tiny_model(name)
    found = run_pass(FreezeCore(), small, None, PADDED, attn="eager", patterns=True)
    for layer, site in sites(small).items():
        want = due(site, found.layers[layer], PADDED.real, []).pattern
        pattern = found.layers[layer].pattern
        assert pattern is not None
        assert ((pattern - want).transpose(1, 2)[PADDED.real].abs() < 1e-5).all()


@pytest.mark.parametrize("name", BY_HEART)
def test_used_and_unused_are_inverses(name: str) -> None:
    found = run_pass(FreezeCore(), model(name), None, PADDED)
    for layer, site in sites(model(name)).items():
        seen = found.layers[layer]
        assert site.formula is not None
        for role in ROLES:
            x = torch.randn(2, 8, *site.parts[role].features.shape, dtype=torch.float64)
            back = site.formula.unused(role, site.formula.used(role, x, seen.rotary), seen.rotary)
            assert torch.allclose(back, x, rtol=0, atol=1e-12)


def test_unknown_attention_is_said_to_be_unknown() -> None:
    with pytest.raises(CannotJudge, match="knows no attention of Linear; it knows GPT2Attention"):
        known_sites(torch.nn.Linear(2, 2))
