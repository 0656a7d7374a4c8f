"""What labels are compared with is what the model's own loss compares them with, whatever it is called."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from freeze_core import InterventionError, run_circuit_ablation_study, score_heads
from pytest_circuitfreeze.models import tiny_model

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
MASKED = {
    "Bert": {},
    "Roberta": {"max_position_embeddings": 40},
    "Albert": {"embedding_size": 16},
    "Electra": {"embedding_size": 16},
}


def random_weights(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3).add_(1.0 if "orm.weight" in name else 0.0)
    return model.eval()


def masked_model(name="Bert"):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL, **MASKED[name])
    return random_weights(getattr(transformers, f"{name}ForMaskedLM")(config))


def masked_batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 97, (2, 8), generator=generator)
    labels = torch.full_like(ids, -100)
    labels[:, 2], labels[:, 5] = ids[:, 2], ids[:, 5]
    return {"input_ids": ids.masked_fill(labels != -100, 4), "labels": labels}


@torch.no_grad()
def own_loss(model, **batch):
    return float(model(**batch).loss)


def in_place(logits, labels):
    return F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none").sum(1) / (
        labels != -100
    ).sum(1)


@pytest.mark.parametrize("name", MASKED)
def test_a_masked_model_is_scored_by_its_own_loss(name):
    model, batch = masked_model(name), masked_batch()
    found = score_heads(model, batch, "loss", circuits=["ov"], progress=False)
    expected = score_heads(
        model, batch, lambda logits: in_place(logits, batch["labels"]), circuits=["ov"], progress=False
    )
    torch.testing.assert_close(found.scores["ov"], expected.scores["ov"], rtol=1e-6, atol=1e-6)
    assert found.clean == pytest.approx(own_loss(model, **batch), rel=1e-5)
    study = run_circuit_ablation_study(model, batch, [0], [1], circuits=["ov"], progress=False, resamples=100)
    assert study.clean.perplexity.value == pytest.approx(math.exp(own_loss(model, **batch)), rel=1e-5)


@pytest.mark.parametrize("positions", ["all", [2, 5], [5]])
def test_labels_in_place_are_those_of_the_positions(positions):
    model, batch = masked_model(), masked_batch()
    found = score_heads(model, batch, "loss", circuits=["ov"], positions=positions, layers=[0], progress=False)
    columns = [2, 5] if positions == "all" else positions
    with torch.no_grad():
        logits = model(**batch).logits[:, columns]
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, columns].flatten())
    assert found.clean == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "falcon_mqa"])
def test_a_causal_model_shifts_labels(name, dtype):
    model = tiny_model(name).to(dtype)
    ids = torch.arange(14).view(2, 7) * 5 % 97
    without = score_heads(model, ids, "loss", circuits=["ov"], layers=[0], progress=False)
    given = score_heads(
        model,
        {"input_ids": ids, "labels": ids, "use_cache": False},
        "loss",
        circuits=["ov"],
        layers=[0],
        progress=False,
    )
    assert torch.equal(without.scores["ov"].nan_to_num(), given.scores["ov"].nan_to_num())
    assert given.clean == pytest.approx(
        own_loss(model, input_ids=ids, labels=ids), rel=2e-2 if dtype == torch.bfloat16 else 1e-5
    )


def test_an_encoder_decoder_does_not_shift_labels():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = random_weights(transformers.T5ForConditionalGeneration(config))
    ids = torch.arange(14).view(2, 7) + 5
    batch = {"input_ids": ids, "labels": ids.flip(1)}
    found = score_heads(model, batch, "loss", circuits=["ov"], layers=[0], progress=False)
    assert found.clean == pytest.approx(own_loss(model, **batch), rel=1e-5)


class Renamed(transformers.BertForMaskedLM):
    """A masked model whose name says otherwise."""


Renamed.__name__ = "BertForCausalLM"


class Shifting(transformers.BertForMaskedLM):
    """A model whose name says that it is masked, and whose loss shifts labels."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        output = super().forward(input_ids, attention_mask, **kwargs)
        if labels is not None:
            output.loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return output


@pytest.mark.parametrize("cls", [Renamed, Shifting])
def test_the_loss_decides_and_not_the_name(cls):
    model, batch = random_weights(cls(transformers.BertConfig(**SMALL))), masked_batch()
    found = score_heads(model, batch, "loss", circuits=["ov"], layers=[0], progress=False)
    assert found.clean == pytest.approx(own_loss(model, **batch), rel=1e-5)


class Smoothed(transformers.BertForMaskedLM):
    """A loss that is neither."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        output = super().forward(input_ids, attention_mask, **kwargs)
        output.loss = None if labels is None else output.logits.square().mean()
        return output


class WithoutLoss(nn.Module):
    """A model of one's own, without a loss."""

    def __init__(self):
        super().__init__()
        self.inner = tiny_model("gpt2")
        self.config = self.inner.config

    def forward(self, input_ids):
        return self.inner(input_ids)


def test_a_loss_that_tells_nothing_is_asked_about():
    batch = masked_batch()
    for model in (random_weights(Smoothed(transformers.BertConfig(**SMALL))), WithoutLoss()):
        with pytest.raises(InterventionError, match=r"unknown which of the two is meant; give targets="):
            score_heads(model, batch, "loss", progress=False)


def test_next_tokens_of_a_model_without_a_loss_need_no_labels():
    ids = torch.arange(14).view(2, 7) * 5 % 97
    found, expected = (
        score_heads(model, {"input_ids": ids}, "loss", circuits=["ov"], progress=False)
        for model in (WithoutLoss(), tiny_model("gpt2"))
    )
    torch.testing.assert_close(found.scores["ov"], expected.scores["ov"], rtol=0, atol=1e-5)


def test_a_masked_model_without_labels_is_asked_for_them():
    batch = {"input_ids": masked_batch()["input_ids"]}
    with pytest.raises(InterventionError, match="compares the logits of each token with its own label: give labels"):
        score_heads(masked_model(), batch, "loss", progress=False)
    with pytest.raises(InterventionError, match="inputs hold no labels"):
        run_circuit_ablation_study(masked_model(), batch, [0], [1], progress=False)
    score_heads(masked_model(), batch, "loss", targets=5, circuits=["ov"], layers=[0], progress=False)


def test_asking_the_model_leaves_torchs_generators_alone():
    model = masked_model().train()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    score_heads(model, masked_batch(), "loss", circuits=["ov"], layers=[0], progress=False)
    assert torch.equal(torch.rand(3), expected)
