"""Padding is told from the masks that families make of it, and from no other."""

from __future__ import annotations

import pytest
import torch

from freeze_core import AttentionCircuitFreezer, InterventionConfig, InterventionError
from freeze_core.freezing.padding import padding_mask
from pytest_circuitfreeze.shrinking import tiny_of_type

REAL = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
CAUSAL = torch.ones(5, 5).tril().bool()


def added(seen: torch.Tensor) -> torch.Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("form", [lambda seen: seen, added])
@pytest.mark.parametrize("hidden", [CAUSAL, torch.ones(5, 5).bool(), CAUSAL[-2:]])
def test_padding_is_told_from_a_mask_of_scores(form, hidden):
    seen = hidden & REAL[:, None, None]
    assert torch.equal(padding_mask(form(seen)), REAL)
    freed = seen | ~seen.any(-1, keepdim=True)
    assert torch.equal(padding_mask(form(freed)), REAL)


@pytest.mark.parametrize("mask", [None, REAL.long(), REAL])
def test_a_padding_mask_is_itself(mask):
    found = padding_mask(mask)
    assert found is None if mask is None else torch.equal(found, REAL)


def test_other_masks_are_refused():
    window = CAUSAL & ~CAUSAL.tril(-2)
    packed = CAUSAL & (torch.arange(5)[:, None] // 3 == torch.arange(5) // 3)
    for hidden in (window, packed):
        with pytest.raises(InterventionError, match=r"attention_mask is \[1, 5, 5\]"):
            padding_mask(hidden[None, None])
    with pytest.raises(InterventionError, match=r"attention_mask is \[3, 5, 1\]"):
        padding_mask(REAL[..., None])


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_bert_freezes_to_the_mean_of_real_tokens(model_type, attn):
    model = tiny_of_type(model_type, attn=attn)
    ids, mask = torch.arange(10).view(2, 5), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    arguments = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    freezer = AttentionCircuitFreezer()
    clean = freezer.record(model, arguments)[0].v
    with freezer.freeze_circuits(model, InterventionConfig([0], [1], "ov", "mean")):
        frozen = freezer.record(model, arguments)[0].v
    assert torch.allclose(frozen[:, :, 1], clean[mask.bool()].mean(0)[1], atol=1e-6)
