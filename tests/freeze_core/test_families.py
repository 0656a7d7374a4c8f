"""The tables of storages against what differentiation finds, which knows neither names nor layouts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers

from freeze_core.attention import families, probed, sites
from freeze_core.attention.probe import probe
from freeze_core.attention.sites import find_sites
from freeze_core.attention.storages import layout_of
from pytest_circuitfreeze.models import TINY, tiny_model
from pytest_circuitfreeze.shrinking import tiny_of_type

FUSED_TYPES = (
    *("bloom", "gpt_neox", "gpt_neox_japanese", "persimmon", "codegen", "mpt", "dbrx", "gpt_bigcode", "openai-gpt"),
    *("phi3", "phi4_multimodal", "fuyu"),
)
ODD_TYPES = (
    *(
        "qwen3_next",
        "olmo2",
        "bitnet",
        "afmoe",
        "gpt_oss",
        "deepseek_v3",
        "bert",
        "xlm",
        "ctrl",
        "moshi",
        "gemma3_text",
    ),
    *("cohere2", "stablelm", "gptj", "opt", "lfm3", "laguna", "hy_v4", "minimax", "qwen3_moe", "modernbert-decoder"),
)


def table(model, layer):
    """What the tables say of each query head: features of q, k and v by module."""
    site = find_sites(model).by_layer[layer]
    modules = {module: name for name, module in site.attention.named_modules()}
    # A wrapper around a linear layer gives what the layer in it gives.
    inner = {module: f"{name}.linear" if hasattr(module, "linear") else name for module, name in modules.items()}
    told = []
    for head in range(site.heads):
        roles = {}
        for role, parts in site.layout.shared.features.items():
            roles[role] = {}
            for part in parts:
                own = part.features[head // (site.heads // len(part.features))]
                name = inner[site.layout.shared.modules[part.module]]
                roles[role][name] = frozenset(own.tolist()) | roles[role].get(name, frozenset())
        told.append(roles)
    return told


def agree(model):
    layer = max(find_sites(model).by_layer)
    site = find_sites(model).by_layer[layer]
    norms = [module for module in site.layout.shared.modules.values() if "norm" in type(module).__name__.lower()]
    gates = [child for name, child in site.attention.named_children() if name in families.HARMLESS]
    found = probe(model, site.attention, site.layout.output, site.heads, norms, gates)
    return found == table(model, layer)


@pytest.mark.parametrize("name", TINY)
def test_the_tables_agree_with_the_probe(name):
    assert agree(tiny_model(name, attn="eager"))


@pytest.mark.parametrize("name", TINY)
def test_a_class_that_is_not_trusted_is_found_to_be_what_the_tables_say(name, monkeypatch):
    """Heads that get keys and values of their own included."""
    monkeypatch.setattr(sites, "runs_library_code", lambda module, checked: False)
    for site in find_sites(tiny_model(name)).by_layer.values():
        facts = probed._KNOWN[site.attention].facts
        assert facts.named
        assert facts.per_head == (layout_of(site.attention, None).unshared is not None)


@pytest.mark.parametrize("model_type", [*FUSED_TYPES, *ODD_TYPES])
def test_the_tables_agree_with_the_probe_on_every_fused_and_odd_type(model_type):
    assert agree(tiny_of_type(model_type, attn="eager"))


SWAPPED = [
    (entry, order)
    for entry in ("GPT2Attention", "BloomAttention", "FalconAttention", "CodeGenAttention")
    for order in (("k", "q", "v"), ("q", "v", "k"), ("v", "k", "q"), ("q", "k", "v"))
    if order != families.FUSED[entry].order
]


@pytest.mark.parametrize(("entry", "order"), SWAPPED)
def test_a_table_with_two_entries_swapped_is_caught(entry, order, monkeypatch):
    right = families.FUSED[entry]
    monkeypatch.setitem(families.FUSED, entry, dataclasses.replace(right, order=order))
    names = {"GPT2Attention": "gpt2", "FalconAttention": "falcon_mha"}
    model = tiny_model(names[entry]) if entry in names else tiny_of_type(entry[:-9].lower(), attn="eager")
    assert not agree(model)


def test_a_block_too_many_is_caught(monkeypatch):
    right = families.FUSED["BloomAttention"]
    monkeypatch.setitem(families.FUSED, "BloomAttention", dataclasses.replace(right, blocks=lambda attention: 1))
    assert not agree(tiny_of_type("bloom", attn="eager"))


def test_the_probe_leaves_the_model_alone():
    model = tiny_model("falcon_mqa")
    ids = torch.arange(6).view(1, 6)
    clean = model(ids).logits
    agree(model)
    assert torch.equal(model(ids).logits, clean)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert transformers.PreTrainedModel in type(model).__mro__
