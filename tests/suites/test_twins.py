"""Twins compute the same function as what they are twins of."""

from __future__ import annotations

import pytest
import torch
from by_heart import BY_HEART

from pytest_circuitfreeze.models import tiny_model
from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.claims import NotApplicable
from pytest_circuitfreeze.suites.judge.equivalent_models import equivalent_models
from pytest_circuitfreeze.suites.judge.site_lookup import sites

IDS = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[0, 0, *[1] * 10], [1] * 12])


@pytest.mark.parametrize("name", BY_HEART)
def test_twins_give_the_same_logits(name: str) -> None:
    model = tiny_model(name, dtype=torch.float64)
    batch = Batch(IDS, MASK)
    with torch.no_grad():
        want = model(**batch.arguments(model)).logits[batch.real]
        for twin in equivalent_models(model):
            got = twin.model(**batch.arguments(twin.model)).logits[batch.real]
            # Norms are taken in float32 in several families and may round the last float64 digit another way.
            assert (got - want).abs().max() < 1e-6, twin.name


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("gpt2", ["its fused projection split", "OPT with the same weights"]),
        ("opt", ["GPT-2 with the same weights"]),
        ("llama", ["Phi-3 with the same weights"]),
        ("mistral_gqa", ["Phi-3 with the same weights"]),
        ("phi3", ["its fused projection split"]),
        ("falcon_mqa", ["its fused projection split"]),
        ("falcon_mha", ["its fused projection split"]),
        ("falcon_gqa", ["its fused projection split"]),
    ],
)
def test_twins_store_their_projections_otherwise(name: str, names: list[str]) -> None:
    model = tiny_model(name)
    assert [twin.name for twin in equivalent_models(model)] == names
    for twin in equivalent_models(model):
        own, other = sites(model)[0].module, sites(twin.model)[0].module
        assert hasattr(own, "q_proj") != hasattr(other, "q_proj")


def test_twins_share_no_parameter() -> None:
    model = tiny_model("gpt2")
    own = {parameter.data_ptr() for parameter in model.parameters()}
    for twin in equivalent_models(model):
        assert own.isdisjoint(parameter.data_ptr() for parameter in twin.model.parameters())


def test_a_model_that_has_no_twin_is_said_to_have_none() -> None:
    model = tiny_model("llama")
    model.config.model_type = "unheard_of"
    with pytest.raises(NotApplicable, match="LlamaForCausalLM stores queries, keys and values apart"):
        equivalent_models(model)
