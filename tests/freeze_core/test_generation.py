"""Generating under a freeze: with a cache what it is without one, however tokens are chosen."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from cache_names import CACHE
from recomputed import FREEZER, IDS, LEFT, agrees, arguments, config_of, recomputed
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.models.csm.modeling_csm import CsmBackboneModel

from freeze_core import InterventionConfig, InterventionError
from pytest_circuitfreeze.models import tiny_model
from pytest_circuitfreeze.suites.tolerance import nudged

FREEZES = [("zero", "group"), ("zero", "head"), ("noise_std", "head"), ("mean", "group"), ("noise", "head")]
NEW = 8
ALL = torch.ones_like(IDS)

# Tiny models repeat themselves; what must not be repeated is decided by the tokens alone.
VARIED = {"no_repeat_ngram_size": 2}
WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 0},
    "in pieces": {"prefill_chunk_size": 5},
    "static cache": {"cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {},
}
ONE_ROW = ("prompt lookup", "assisted")
"""What transformers does for one sequence at a time."""

pytestmark = [
    pytest.mark.filterwarnings("error::freeze_core.StaleCacheWarning"),
    # transformers' own, on how it calls an assistant.
    pytest.mark.filterwarnings("ignore:Passing `generation_config` together"),
]


def generate(model, ids, mask, **how):
    usual = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    given = {"attention_mask": mask, "return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    torch.manual_seed(0)
    with torch.no_grad():
        return model.generate(ids, **{**usual, **given, **({} if "num_beams" in how else VARIED), **how})


def same_where_told_apart(tokens, others, scores, bound):
    """How many new tokens are the same: of each row, up to where its two best are closer than rounding."""
    compared = 0
    for row in range(len(tokens)):
        for step in range(NEW):
            best = scores[step][row].topk(2).values
            if best[0] - best[1] <= 2 * bound:  # each of the two moves by as much as `bound`
                break
            assert tokens[row, step] == others[row, step], (row, step)
            compared += 1
    return compared


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("kind", "scope"), FREEZES)
def test_generating_with_a_cache_is_recomputing(model, kind, scope, way):
    config = config_of(kind, model, kv_scope=scope)
    ids, mask = (IDS[:1], ALL[:1]) if way in ONE_ROW else (IDS, LEFT)
    how = {**WAYS[way], **({"assistant_model": copy.deepcopy(model)} if way == "assisted" else {})}
    with FREEZER.freeze_circuits(model, config):
        out = generate(model, ids, mask, **how)
        plain = generate(model, ids, mask, use_cache=False, **(how if way == "sampled" else {}))
    whole = torch.cat([mask, torch.ones(len(ids), NEW, dtype=torch.long)], dim=1)
    want = recomputed(model, config, arguments(out.sequences, whole), whole)
    agrees(torch.stack(out.logits, dim=1), want.logits[:, ids.shape[1] - 1 : -1], want.bound)
    tokens, others = (one.sequences[:, ids.shape[1] :] for one in (out, plain))
    if way == "sampled":
        assert torch.equal(tokens, others)
    else:
        assert same_where_told_apart(tokens, others, plain.scores, want.bound) > NEW // 2
    with torch.no_grad():
        unfrozen = model(**arguments(out.sequences, whole), use_cache=False).logits
    assert (unfrozen - want.logits)[whole.bool()].abs().max() > 2 * want.bound


@pytest.mark.parametrize(("kind", "scope"), FREEZES)
def test_beam_search_with_a_cache_is_recomputing(model, kind, scope):
    config = config_of(kind, model, kv_scope=scope)
    with FREEZER.freeze_circuits(model, config):
        out, plain = (generate(model, IDS, LEFT, num_beams=3, use_cache=cached) for cached in (True, False))
    whole = torch.cat([LEFT, torch.ones(2, NEW, dtype=torch.long)], dim=1)
    want = recomputed(model, config, arguments(out.sequences, whole), whole)
    assert torch.equal(out.sequences, plain.sequences)
    logprobs = want.logits[:, IDS.shape[1] - 1 : -1].log_softmax(-1)
    scores = logprobs.gather(-1, out.sequences[:, IDS.shape[1] :, None]).mean(dim=(1, 2))
    # A log-probability moves by its own logit and by the logarithm of the sum, which moves by no more than the largest.
    agrees(out.sequences_scores, scores, 2 * want.bound)


def test_resample_generates_where_rows_stay(model):
    """A column of a row is that of another row, cached or not."""
    config = config_of("resample", model)
    for how in ({}, {"do_sample": True, "top_k": 0}, {"prefill_chunk_size": 5}):
        with FREEZER.freeze_circuits(model, config):
            out = generate(model, IDS, ALL, **how)
            plain = generate(model, IDS, ALL, use_cache=False, **{**how, "prefill_chunk_size": None})
        want = recomputed(model, config, arguments(out.sequences, None))
        agrees(torch.stack(out.logits, dim=1), want.logits[:, IDS.shape[1] - 1 : -1], want.bound)
        assert torch.equal(out.sequences, plain.sequences)
    with FREEZER.freeze_circuits(model, config), pytest.raises(InterventionError, match="needs a padding mask"):
        generate(model, IDS, ALL, cache_implementation="static")  # generate makes a mask of its own for it


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("sampled", [True, False])
def test_resample_where_rows_are_reordered_is_refused(model, use_cache, sampled):
    how = {"num_beams": 3, "use_cache": use_cache, "do_sample": sampled}
    with FREEZER.freeze_circuits(model, config_of("resample", model)):
        with pytest.raises(InterventionError, match="beam search"):
            generate(model, IDS, ALL, **how)
        generate(model, IDS, ALL, use_cache=use_cache)


def test_passes_that_do_not_go_on_from_one_another_are_not_taken_for_beam_search(model):
    def run(ids):
        with torch.no_grad():
            model(ids, use_cache=False)

    with FREEZER.freeze_circuits(model, config_of("resample", model)):
        run(IDS[:, :5])
        run(IDS[:, :6])
        run(IDS[:, :6].flip(0))
        run(IDS[:, 1:8])
        run(torch.cat([IDS[:, 1:8], IDS[:, :1]], dim=1))
        with pytest.raises(InterventionError, match="in another order"):
            run(torch.cat([IDS[:, 1:8], IDS[:, :2]], dim=1).flip(0))
    reordered = IDS[:, :8].flip(0)
    for ids in (IDS[:, :7], reordered):  # a freeze of its own for each knows of no other
        with FREEZER.freeze_circuits(model, config_of("resample", model)):
            run(ids)
    with FREEZER.freeze_circuits(model, InterventionConfig([0])):  # a freeze that needs no rows looks at none
        run(IDS[:, :7])
        run(reordered)


def test_an_assistant_that_is_frozen_otherwise_guesses_and_no_more(model):
    """The assistant's own freeze, its own cache: tokens and logits are those of the model that is generated from."""
    config = config_of("noise_std", model, kv_scope="head")
    helper = copy.deepcopy(model)
    with FREEZER.freeze_circuits(model, config), FREEZER.freeze_circuits(helper, config_of("zero", helper)):
        out, plain = (generate(model, IDS[:1], ALL[:1], **how) for how in ({"assistant_model": helper}, {}))
    assert torch.equal(out.sequences, plain.sequences)


def test_the_bound_is_far_below_what_matters(model):
    """Else nothing above would say much: rounding moves logits by less than a thousandth of what they are."""
    config = config_of("zero", model)
    want = recomputed(model, config, arguments(IDS, LEFT), LEFT)
    assert want.bound < 1e-3 * want.logits.abs().max()
    assert nudged(model) is not model


def test_continuous_batching_is_refused():
    """It packs several sequences in one row and tells the model no columns: noise would be drawn for others."""
    model = tiny_model("llama")
    how = {
        "generation_config": GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1, pad_token_id=0),
        "continuous_batching_config": ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32),
    }
    with FREEZER.freeze_circuits(model, config_of("noise_std", model)):
        refused = model.generate_batch(inputs=IDS.tolist(), **how)
    assert len(refused) == 2
    for result in refused.values():
        assert not result.generated_tokens
        assert "use generate()" in result.error
    served = model.generate_batch(inputs=IDS.tolist(), **how)
    assert all(len(result.generated_tokens) == 2 for result in served.values())


@torch.no_grad()
def test_noise_with_a_cache_where_each_token_has_several_codes():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8, "vocab_size": 40}
    special = dict.fromkeys(("pad_token_id", "codebook_pad_token_id", "codebook_eos_token_id", "bos_token_id"), 0)
    config = transformers.CsmConfig(
        num_codebooks=4, intermediate_size=32, num_key_value_heads=2, depth_decoder_config=sizes, **sizes, **special
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CsmBackboneModel(config).eval()
    ids = torch.arange(48).view(2, 6, 4) % 39 + 1
    with FREEZER.freeze_circuits(model, InterventionConfig([0], [1], freeze_type="noise", noise_std=1.0)):
        whole = model(input_ids=ids, use_cache=False).last_hidden_state
        cache = transformers.DynamicCache()
        model(input_ids=ids[:, :4], **{CACHE: cache})
        rest = model(input_ids=ids[:, 4:], **{CACHE: cache}).last_hidden_state
    torch.testing.assert_close(rest, whole[:, 4:])
