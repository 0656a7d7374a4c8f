"""Padding is known where a model's layers are not told of it, and a frozen model still says what it takes."""

from __future__ import annotations

import inspect

import pytest
import torch
from cache_names import CACHE, cache_of

from freeze_core import AttentionCircuitFreezer, InterventionConfig
from pytest_circuitfreeze.models import tiny_model
from pytest_circuitfreeze.shrinking import tiny_of_type

FREEZER = AttentionCircuitFreezer()


def prompted():
    """CPM-Ant puts prompts before the tokens, hands its layers no mask, and takes all tokens again at each step."""
    return tiny_of_type("cpmant", attn="eager", fields={"prompt_length": 4})


def test_padding_is_left_out_where_layers_are_handed_no_mask(ids):
    model, mask = prompted(), torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    other = torch.where(mask.bool(), ids, (ids + 1) % 97)
    held = []
    with torch.no_grad(), FREEZER.freeze_circuits(model, InterventionConfig([0], None, "v", "mean")):
        for given in (ids, other):
            held.append(FREEZER.record(model, {"input_ids": given, "attention_mask": mask}))
    assert torch.equal(held[0][0].v, held[1][0].v)
    assert torch.equal(held[0].attention_mask, torch.nn.functional.pad(mask, (4, 0), value=1))
    assert FREEZER.calibrate(model, [{"input_ids": ids, "attention_mask": mask}], progress=False).tokens == 4 * 2 + 12


def test_noise_is_the_same_where_a_step_is_handed_the_cached_tokens_again(ids):
    model = prompted()
    with torch.no_grad(), FREEZER.freeze_circuits(model, InterventionConfig([0], [1, 3], "v", "noise", noise_std=1.0)):
        whole = FREEZER.record(model, {"input_ids": ids, "use_cache": False})[0].v
        cache = cache_of(model(ids[:, :6], use_cache=True))
        step = FREEZER.record(model, {"input_ids": ids, CACHE: cache, "use_cache": True})[0].v
    assert (whole.shape[1], step.shape[1]) == (4 + 7, 1)
    assert torch.equal(step[:, -1, [1, 3]], whole[:, -1, [1, 3]])


@pytest.mark.parametrize("name", ["cpmant", "gemma3", "llama"])
def test_a_frozen_model_still_shows_the_arguments_that_it_takes(name, ids):
    model = tiny_model(name)
    stacks = [module for module in model.modules() if "input_ids" in inspect.signature(module.forward).parameters]
    before = [inspect.signature(module.forward) for module in stacks]
    with FREEZER.freeze_circuits(model, InterventionConfig([0], [1])):
        assert any("forward" in vars(module) for module in stacks)
        assert [inspect.signature(module.forward) for module in stacks] == before
