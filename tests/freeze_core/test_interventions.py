"""Whole heads, and what a model allows."""

from __future__ import annotations

import pytest
import torch
import transformers

from freeze_core import AttentionCircuitFreezer, CircuitFreezeError, ExperimentalInterventions, InterventionConfig
from freeze_core.attention.sites import find_sites
from freeze_core.freezing.draws import NoiseTable
from pytest_circuitfreeze.models import tiny_model
from pytest_circuitfreeze.shrinking import tiny_of_type

FREEZER, EXPERIMENTS = AttentionCircuitFreezer(), ExperimentalInterventions()


def attention_output(model, ids):
    """What the attention of layer 1 gives, and its output projection."""
    projection = find_sites(model).by_layer[1].layout.output
    seen = []
    hook = projection.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(ids)
    hook.remove()
    return seen[0], projection


@pytest.mark.parametrize("freeze_type", ["zero", "mean", "noise"])
def test_a_heads_output_is_held_and_the_others_are_not(any_storage, ids, freeze_type):
    z = FREEZER.record(any_storage, ids)[1].z
    with EXPERIMENTS.freeze_attention_heads(any_storage, {1: [0, -1]}, freeze_type=freeze_type, noise_std=0.5):
        frozen, projection = attention_output(any_storage, ids)
        again, _ = attention_output(any_storage, ids)
    assert torch.equal(frozen, again)
    drawn = NoiseTable((0, 1, 3), 4, 8).columns(0, 7, z) * 0.5
    for head in (0, 3):
        z[:, :, head] = {"zero": 0, "mean": z[:, :, head].mean(dim=(0, 1)), "noise": drawn[:, head]}[freeze_type]
    torch.testing.assert_close(frozen, projection(z.flatten(2)).detach(), rtol=1e-5, atol=1e-5)


def test_freezing_z_and_its_gradient(ids):
    model = tiny_model("gpt2")
    for mode, passes in (("stopgrad", False), ("ste", True), ("circuit_ste", True)):
        model.zero_grad()
        with EXPERIMENTS.freeze_attention_heads(model, {2: [0, 1, 2, 3]}, backward_mode=mode):
            model(ids).logits.square().mean().backward()
        assert (model.transformer.h[2].attn.c_attn.weight.grad.abs().max() > 0) == passes


def test_removal_and_nesting_with_circuits(model, ids):
    clean = model(ids).logits
    with FREEZER.freeze_circuits(model, InterventionConfig([1], [1], "qk", kv_scope="head")):
        circuit = model(ids).logits
        with EXPERIMENTS.freeze_attention_heads(model, {1: [1], 0: [0, 2]}):
            assert not torch.equal(model(ids).logits, circuit)
        assert torch.equal(model(ids).logits, circuit)
    assert torch.equal(model(ids).logits, clean)


@pytest.mark.parametrize(
    ("heads", "fields", "message"),
    [
        ({}, {}, "must be a dict"),
        ([1], {}, "must be a dict"),
        ({9: [0]}, {}, "9 is out of range"),
        ({0: [7]}, {}, "7 is out of range"),
        ({0: []}, {}, "not empty"),
        ({0: [True]}, {}, "bool is not an index"),
        ({0: [0], -3: [1]}, {}, "same layer twice"),
        ({0: [0]}, {"circuit": "qk"}, "circuit: unknown argument; allowed are attention, backward_mode"),
        ({0: [0]}, {"strenght": 1}, "strenght: unknown argument; allowed are .*strength"),
        ({0: [0]}, {"strength": 2}, "strength=2"),
    ],
)
def test_bad_heads_are_refused_and_nothing_is_installed(heads, fields, message):
    model = tiny_model("gpt2")
    with pytest.raises(CircuitFreezeError, match=message):
        EXPERIMENTS.freeze_attention_heads(model, heads, **fields)
    assert not any("forward" in vars(module) for module in model.modules())


def test_compatibility_is_told_site_by_site():
    report = EXPERIMENTS.check_model_compatibility(tiny_model("mistral_gqa"))
    assert report["compatible"]
    assert report["self"][2] == {
        "name": "model.layers.2.self_attn",
        "architecture": "separate_qkv",
        "num_heads": 4,
        "num_kv_heads": 2,
        "kv_scope": ("group", "head"),
        "limits": [],
    }
    assert "cross" not in report


def test_compatibility_tells_what_of_a_single_head_cannot_be_frozen():
    site = EXPERIMENTS.check_model_compatibility(tiny_model("deepseek_v3"))["self"][0]
    assert site["kv_scope"] == ("group", "head")
    assert [limit.partition(":")[0] for limit in site["limits"]] == [
        f"k of one head under kv_scope='{scope}'" for scope in ("group", "head")
    ]
    assert all(limit.endswith("freeze all the heads that share them, in one config") for limit in site["limits"])


def test_compatibility_tells_why_not():
    report = EXPERIMENTS.check_model_compatibility(tiny_of_type("mamba", attn="eager"))
    assert not report["compatible"]
    assert "mix tokens by a recurrence (MambaMixer)" in report["reasons"][0]
    report = EXPERIMENTS.check_model_compatibility(tiny_of_type("gemma3n_text", attn="eager"))
    assert not report["compatible"]
    assert report["self"][0]["kv_scope"] == ("group", "head")
    assert "an earlier layer's" in report["self"][3]["refused"]


def test_compatibility_of_an_encoder_and_a_decoder():
    config = transformers.BartConfig(
        vocab_size=97,
        d_model=16,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
    )
    report = EXPERIMENTS.check_model_compatibility(transformers.BartForConditionalGeneration(config))
    assert {kind: list(report[kind]) for kind in ("self", "cross", "encoder")} == {
        "self": [0, 1],
        "cross": [0, 1],
        "encoder": [0],
    }
