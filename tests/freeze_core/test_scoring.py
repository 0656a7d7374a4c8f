"""A sweep gives what one freeze a forward gives, by every circuit, scope, freeze type and position, in training too."""

from __future__ import annotations

import pytest
import torch
from one_by_one import one_by_one
from torch import nn

from freeze_core import AttentionCircuitFreezer, score_heads
from freeze_core.attention.sites import find_sites
from pytest_circuitfreeze.models import tiny_model

FREEZER = AttentionCircuitFreezer()
CIRCUITS = ("qk", "ov", "both", "q", "k", "v", "z")
ODD = ("falcon_alibi", "gemma2", "qwen3_next", "bart", "hrm_text", "opt", "mixtral")


def batch(rows=2, columns=7, seed=0):
    ids = torch.randint(0, 97, (rows, columns), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def every_column(batch):
    return torch.arange(batch["input_ids"].shape[1]).expand(len(batch["input_ids"]), -1)


def last_column(batch):
    return every_column(batch)[:, -1:]


def spread(logits):
    """A metric that every position and some words count in."""
    return logits[..., 5].sum(1) - logits[..., 7].sum(1)


def swept(model, batches, at, positions, circuits=CIRCUITS, metric=spread, draws=0, kv_scope="head", **fields):
    """The scores of both, compared to 1e-6 of the metric's scale: the largest clean logit, by the positions counted."""
    sites = find_sites(model)
    heads = max(site.heads for site in sites.by_layer.values())
    fields["kv_scope"] = kv_scope
    torch.manual_seed(draws)
    found = score_heads(model, batches, metric, circuits=circuits, positions=positions, progress=False, **fields)
    expected = one_by_one(model, batches, metric, circuits, at, list(sites.by_layer), heads, draws, **fields)
    with torch.no_grad():
        scale = max(float(model(**one).logits.abs().max()) * at(one).shape[1] for one in batches)
    for circuit in circuits:
        scores = found.scores[circuit]
        assert scores.shape == (sites.layers, heads)
        torch.testing.assert_close(
            scores[: len(expected[circuit])], expected[circuit], rtol=0, atol=1e-6 * scale, equal_nan=True
        )
        assert scores[len(expected[circuit]) :].isnan().all()
        assert float(scores.nan_to_num().abs().max()) > 1e-4 * scale
    return found


@pytest.mark.parametrize("scope", ["group", "head"])
@pytest.mark.parametrize(("positions", "at"), [("all", every_column), ("last", last_column)])
@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "mistral_gqa", "falcon_mqa"])
def test_scores_are_those_of_one_freeze_a_forward(name, positions, at, scope):
    swept(tiny_model(name), [batch()], at, positions, kv_scope=scope)


@pytest.mark.parametrize("name", ODD)
def test_scores_of_odd_models_are_those_of_one_freeze_a_forward(name):
    swept(tiny_model(name), [batch()], last_column, "last", circuits=("qk", "ov", "z"))


@pytest.mark.parametrize("kind", ["mean", "noise", "noise_std", "resample", "reference", "statistics"])
def test_every_freeze_type_is_swept(kind):
    model = tiny_model("llama_gqa")
    other = batch(seed=5)
    fields = {
        "mean": {"freeze_type": "mean", "strength": 0.5},
        "noise": {"freeze_type": "noise", "seed": 3},
        "noise_std": {"freeze_type": "noise", "noise_std": 1.0},
        "resample": {"freeze_type": "resample", "seed": 4},
        "reference": {"freeze_type": "reference", "reference": FREEZER.record(model, other)},
        "statistics": {"freeze_type": "mean", "statistics": FREEZER.calibrate(model, [other], progress=False)},
    }[kind]
    swept(model, [batch()], every_column, "all", **fields)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("freeze_type", ["zero", "mean"])
def test_the_last_position_is_that_of_the_last_real_token(side, freeze_type):
    given = batch(3)
    padding = slice(0, 2) if side == "left" else slice(5, 7)
    given["attention_mask"][0, padding] = 0

    def last_real(one):
        return torch.tensor([[6], [6], [6]]) if side == "left" else torch.tensor([[4], [6], [6]])

    swept(tiny_model("gpt2"), [given], last_real, "last", freeze_type=freeze_type)


def test_chosen_columns_are_handed_to_the_metric_in_their_order():
    swept(tiny_model("gpt2"), [batch()], lambda one: torch.tensor([[6, 2]] * 2), [-1, 2], metric=lambda x: x[:, 0, 5])


def test_scores_are_means_over_all_rows_of_batches_of_any_size():
    found = swept(tiny_model("mistral_gqa"), [batch(1, 5), batch(3, 8, seed=1)], last_column, "last")
    assert found.rows == 4


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_passes_in_training_draw_the_dropout_that_the_clean_pass_drew(name):
    model = tiny_model(name).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    given = [batch(), batch(seed=1)]
    assert not torch.equal(model(**given[0]).logits, model(**given[0]).logits)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    swept(model, given, every_column, "all", circuits=("qk", "ov"), draws=11)
    score_heads(model, given, spread, progress=False)
    torch.manual_seed(11)
    assert torch.equal(torch.get_rng_state(), before)
    score_heads(model, given, spread, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa"])
def test_where_the_products_are_the_same_so_are_the_bits(name):
    model = tiny_model(name).base_model  # nothing is unembedded, at fewer positions or more at once
    given = batch()
    circuits = ("qk", "ov", "z")
    found = score_heads(model, given, spread, circuits=circuits, progress=False).scores
    expected = one_by_one(model, [given], spread, circuits, every_column, range(3), 4, kv_scope="head")
    assert all(torch.equal(found[circuit], expected[circuit]) for circuit in circuits)


class Around(nn.Module):
    """A module of somebody's own, which has no methods of a language model."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids):
        return self.inner(input_ids, use_cache=False)


def test_a_module_around_a_model_is_swept():
    model, ids = tiny_model("gpt2"), batch()["input_ids"]
    found = score_heads(Around(model), ids, spread, progress=False).scores
    expected = score_heads(model, ids, spread, progress=False).scores
    for circuit in expected:
        torch.testing.assert_close(found[circuit], expected[circuit], rtol=1e-5, atol=1e-5)


def test_cross_attention_and_encoders_are_swept():
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 97}
    heads = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = BartForConditionalGeneration(BartConfig(**sizes, **heads, init_std=0.3)).eval()
    given = {**batch(columns=6), "decoder_input_ids": batch(seed=2)["input_ids"]}

    def last(one):
        return torch.full((2, 1), one["decoder_input_ids"].shape[1] - 1)

    for attention in ("self", "cross", "encoder"):
        found = score_heads(model, given, spread, positions="last", attention=attention, progress=False).scores
        expected = one_by_one(
            model, [given], spread, ("qk", "ov"), last, range(2), 2, kv_scope="head", attention=attention
        )
        scale = float(model(**given).logits.detach().abs().max())
        for circuit in ("qk", "ov"):
            torch.testing.assert_close(found[circuit], expected[circuit], rtol=0, atol=1e-6 * scale)
            assert float(found[circuit].abs().max()) > 1e-4 * scale
