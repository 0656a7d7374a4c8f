"""Decoding with a trained model, SmolLM2, whose attention has structure that random weights have not."""

from __future__ import annotations

import pytest
import torch
from recomputed import CACHES, FREEZER, KINDS, agrees, arguments, config_of, decode, handed_over, quantised, recomputed
from transformers import DynamicCache

from pytest_circuitfreeze.loading import SMOLLM2, ModelLoadError, load_model, smollm2_gguf

NEW = 5
# Any tokens do: what counts is that the weights are trained. The first row is padded.
IDS = torch.tensor([[2, 2, 504, 3575, 282, 4649, 314, 7042], [504, 5345, 282, 260, 1166, 8866, 314, 253]])
LEFT = torch.tensor([[0, 0, *[1] * 6], [1] * 8])


@pytest.fixture(scope="module")
def trained():
    pytest.importorskip("gguf", reason="the extra 'smollm2' is not installed")
    try:
        smollm2_gguf()
    except ModelLoadError as error:
        pytest.skip(str(error))
    return load_model(SMOLLM2)


@pytest.mark.parametrize(("kind", "scope"), [("zero", "group"), ("noise_std", "head"), ("mean", "head")])
def test_a_trained_model_decodes_under_a_freeze_as_it_recomputes(trained, kind, scope):
    given = {"input_ids": IDS, "attention_mask": LEFT}
    config = config_of(kind, trained, given, head_indices=[1, 5], kv_scope=scope)
    with FREEZER.freeze_circuits(trained, config), torch.no_grad():
        out = trained.generate(
            **given,
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
    whole = torch.cat([LEFT, torch.ones(2, NEW, dtype=torch.long)], dim=1)
    want = recomputed(trained, config, arguments(out.sequences, whole), whole)
    steps = want.logits[:, IDS.shape[1] - 1 : -1]
    agrees(torch.stack(out.logits, dim=1), steps, want.bound)
    best = steps.topk(2, dim=-1).values
    apart = best[..., 0] - best[..., 1] > 2 * want.bound  # each of the two moves by as much as the bound
    assert apart.any()
    assert torch.equal(out.sequences[:, IDS.shape[1] :][apart], steps.argmax(-1)[apart])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", CACHES)
def test_a_trained_model_is_the_same_with_each_kind_of_cache(trained, cache, kind):
    given = arguments(IDS, LEFT)
    config = config_of(kind, trained, given, head_indices=[1, 5], kv_scope="head")
    want = recomputed(trained, config, given, LEFT)
    with FREEZER.freeze_circuits(trained, config):
        got = decode(trained, IDS, LEFT, CACHES[cache](trained), ((0, 3), (3, 6), (6, 7), (7, 8)))
    agrees(got[LEFT.bool()], want.logits[LEFT.bool()], want.bound)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_model_hands_a_quantised_cache_what_it_hands_any_other(trained, kind):
    pytest.importorskip("optimum.quanto", reason="the extra 'conditions' is not installed")
    config = config_of(kind, trained, arguments(IDS, LEFT), layer_indices=None, head_indices=None)
    coarse, exact = (handed_over(trained, cache, config, IDS, LEFT) for cache in (quantised(trained), DynamicCache()))
    assert torch.equal(coarse, exact)
