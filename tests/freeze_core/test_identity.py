"""Which model statistics are of: the same wherever its weights lie, another one when any weight is another."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from freeze_core import AttentionCircuitFreezer, InterventionConfig, InterventionError
from freeze_core.attention.sites import find_sites
from freeze_core.identity import _coefficients, checksums, is_same_model, model_identity
from pytest_circuitfreeze.models import tiny_model

FREEZER = AttentionCircuitFreezer()
IDS = torch.arange(14).view(2, 7) * 5 % 97


def identity(model):
    return model_identity(find_sites(model))


@torch.no_grad()
def edited(change):
    model = tiny_model("llama_gqa")
    change(model)
    return model


def swap(weight, one, other):
    weight[[one, other]] = weight[[other, one]]


EDITS = {
    "an element inside a query weight": lambda m: m.model.layers[0].self_attn.q_proj.weight[5, 7].mul_(-1),
    "the least bit of an element": lambda m: (
        m.model.layers[1].mlp.up_proj.weight.view(torch.int32)[3, 3].bitwise_xor_(1)
    ),
    "a row of another sign": lambda m: m.model.layers[2].self_attn.v_proj.weight[3].neg_(),
    "inside of a value weight": lambda m: m.model.layers[0].self_attn.v_proj.weight[2:-2].zero_(),
    "rows that changed places": lambda m: swap(m.model.layers[0].self_attn.q_proj.weight, 1, 9),
    "columns that changed places": lambda m: swap(m.model.layers[0].self_attn.q_proj.weight.T, 1, 9),
    "an embedding": lambda m: m.model.embed_tokens.weight[50].add_(1),
    "a norm": lambda m: m.model.layers[1].input_layernorm.weight[3].add_(1e-3),
    "the unembedding": lambda m: m.lm_head.weight[0, 0].add_(1e-3),
    "through data": lambda m: m.model.layers[1].mlp.up_proj.weight.data[4].zero_(),
}


@pytest.mark.parametrize("what", EDITS)
def test_an_edit_of_any_weight_makes_another_model(what):
    assert identity(edited(EDITS[what])) != identity(tiny_model("llama_gqa"))


@pytest.mark.parametrize("what", EDITS)
def test_an_edit_is_noticed_after_a_first_look(what):
    model = tiny_model("llama_gqa")
    before = identity(model)
    with torch.no_grad():
        EDITS[what](model)
    assert identity(model) != before


def test_rows_written_through_data_are_noticed_in_a_large_weight_that_was_looked_at():
    module = nn.Linear(300, 200)
    before = checksums(module)
    assert checksums(module) == before
    module.weight.data[77] += 1.0
    after = checksums(module)
    assert after != before
    module.weight.data[:, 3] = 0.0
    assert checksums(module) != after
    with torch.no_grad():
        module.weight[13, 17] = 3.0  # one element, which torch counts
    assert len({tuple(one) for one in (before, after, checksums(module))}) == 3


def test_layers_that_changed_places_make_another_model():
    model = tiny_model("llama_gqa")
    layers = model.model.layers
    layers[0].mlp, layers[1].mlp = layers[1].mlp, layers[0].mlp
    assert identity(model) != identity(tiny_model("llama_gqa"))


def as_base(model):
    return model.base_model


def in_training(model):
    return model.train()


def without_gradients(model):
    return model.requires_grad_(False)


def within_another_module(model):
    return nn.ModuleDict({"policy": model})


def strided(model):
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().T.contiguous().T)
    return model


def untied(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


SAME = [copy.deepcopy, as_base, in_training, without_gradients, within_another_module, strided, untied]


@pytest.mark.parametrize("change", SAME)
@pytest.mark.parametrize("name", ["gpt2", "llama_gqa"])
def test_the_same_weights_are_the_same_model(change, name):
    model = tiny_model(name)
    statistics = FREEZER.calibrate(model, [IDS], progress=False)
    config = InterventionConfig([0], [1], "ov", "mean", statistics=statistics)
    FREEZER.freeze_circuits(change(model), config).remove()


def test_one_dtype_is_not_another():
    assert identity(tiny_model("llama_gqa").bfloat16()) != identity(tiny_model("llama_gqa"))


def test_a_frozen_model_is_the_same_one():
    model = tiny_model("llama_gqa")
    before = identity(model)
    with FREEZER.freeze_circuits(model, InterventionConfig([0], [1], kv_scope="head")):
        assert identity(model) == before


def test_identity_does_not_depend_on_torchs_defaults():
    expected, model = checksums(tiny_model("llama_gqa")), tiny_model("llama_gqa")
    _coefficients.cache_clear()
    with torch.device("meta"), torch.inference_mode():
        assert checksums(model) == expected
    assert checksums(model) == expected


def test_weights_without_values_are_refused():
    model = tiny_model("llama_gqa").to("meta")
    with pytest.raises(InterventionError, match=r"model\.embed_tokens\.weight is on the meta device"):
        identity(model)


OLD = "0a782930ec12053d"
"""Of tiny_model("llama_gqa"), as earlier versions wrote it."""


def test_an_identity_of_earlier_versions_is_compared_as_they_did():
    with pytest.warns(UserWarning, match="saved by an earlier version.*make and save it anew"):
        assert is_same_model(OLD, find_sites(tiny_model("llama_gqa")), "statistics")
    assert not is_same_model(OLD, find_sites(tiny_model("llama_gqa", seed=1)), "statistics")


def test_statistics_of_earlier_versions_warn_and_those_of_another_model_are_refused():
    model = tiny_model("llama_gqa")
    statistics = FREEZER.calibrate(model, [IDS], progress=False)
    statistics.identity = OLD
    config = InterventionConfig([0], [1], "ov", "mean", statistics=statistics)
    with pytest.warns(UserWarning, match="statistics was saved by an earlier version"):
        FREEZER.freeze_circuits(model, config).remove()
    with pytest.raises(InterventionError, match="of another model"):
        FREEZER.freeze_circuits(tiny_model("llama_gqa", seed=1), config)
