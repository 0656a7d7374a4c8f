"""What a sweep is asked for: metrics, targets, positions, batches; what is refused before anything is run."""

from __future__ import annotations

import sys

import pytest
import torch
from encoder_decoders import bart
from one_by_one import FREEZER, frozen
from torch.nn import functional as F
from transformers import DynamicCache

from freeze_core import CircuitFreezeError, HeadScores, InterventionConfig, InterventionError, score_heads
from pytest_circuitfreeze.models import tiny_model

IDS = torch.arange(14).view(2, 7) * 5 % 97
KEYS = torch.ones(2, 4, 7, 8)
PADDED = {"input_ids": IDS, "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])}


def logits_under(model, given, *freeze):
    with torch.no_grad():
        if not freeze:
            return model(**given).logits.double()
        with frozen(model, *freeze, kv_scope="head"):
            return model(**given).logits.double()


def by_hand(metric, logits, clean):
    """The built-in metrics, of the real positions of `PADDED`, written down once more."""
    real = PADDED["attention_mask"].double()
    probabilities = logits.softmax(-1)

    def mean(values, counted=real):
        return (values * counted).sum(1) / counted.sum(1)

    if metric == "kl":
        before = clean.softmax(-1)
        return mean((before * (before / probabilities).log()).sum(-1))
    if metric == "loss":
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), IDS[:, 1:], reduction="none")
        return mean(losses, (real[:, 1:] * real[:, :-1]))
    if metric == "probability":
        return mean(torch.stack([probabilities[0, :, 3], probabilities[1, :, 4]]))
    return mean(logits[..., 3] - logits[..., 4])


@pytest.mark.parametrize(
    ("metric", "targets"), [("kl", None), ("loss", None), ("probability", [3, 4]), ("logit_difference", (3, 4))]
)
def test_built_in_metrics_are_means_over_real_positions(metric, targets):
    model = tiny_model("gpt2")
    found = score_heads(model, PADDED, metric, targets=targets, circuits=["z"], layers=[1], progress=False)
    clean = logits_under(model, PADDED)
    for head in range(4):
        expected = by_hand(metric, logits_under(model, PADDED, "z", 1, head), clean) - by_hand(metric, clean, clean)
        torch.testing.assert_close(found.scores["z"][1, head], expected.mean(), rtol=1e-5, atol=1e-6)
    assert found.clean == pytest.approx(float(by_hand(metric, clean, clean).mean()), rel=1e-6, abs=1e-7)
    assert found.metric == metric


def test_loss_is_of_labels_where_they_are_given_and_of_targets_where_those_are():
    model = tiny_model("gpt2")
    labels = IDS.clone()
    labels[:, :4] = -100
    found = score_heads(model, {**PADDED, "labels": labels}, "loss", circuits=["z"], progress=False)
    with torch.no_grad():
        assert found.clean == pytest.approx(float(model(**PADDED, labels=labels).loss), rel=1e-6)
        last = F.cross_entropy(model(IDS).logits[:, -1], torch.tensor([8, 9]))
    found = score_heads(model, IDS, "loss", positions="last", targets=[8, 9], circuits=["z"], progress=False)
    assert found.clean == pytest.approx(float(last), rel=1e-6)


def test_labels_of_an_encoder_and_decoder_are_what_its_decoder_is_given():
    model = bart()
    given = {"input_ids": IDS, "labels": IDS[:, :5] + 1}
    found = score_heads(model, given, "loss", circuits=["z"], layers=[0], progress=False)
    with torch.no_grad():
        assert found.clean == pytest.approx(float(model(**given).loss), rel=1e-6)


def test_words_that_the_model_rules_out_play_no_part_in_kl():
    model = tiny_model("gpt2")
    model.lm_head.register_forward_hook(
        lambda module, args, output: output.index_fill(-1, torch.tensor([7]), -torch.inf)
    )
    found = score_heads(model, PADDED, "kl", circuits=["z"], layers=[1], progress=False).scores["z"]
    others = torch.arange(97) != 7
    clean, frozen = logits_under(model, PADDED), logits_under(model, PADDED, "z", 1, 2)
    expected = by_hand("kl", frozen[..., others], clean[..., others])
    torch.testing.assert_close(found[1, 2], expected.mean(), rtol=1e-5, atol=1e-6)


def test_targets_are_those_of_the_rows_of_all_batches():
    model = tiny_model("gpt2")
    batches = [IDS[:1], IDS[:, :5]]
    found = score_heads(
        model, batches, "logit_difference", positions="last", targets=[[1, 2], [3, 4], [5, 6]], progress=False
    )
    with torch.no_grad():
        first, second = model(IDS[:1]).logits[:, -1], model(IDS[:, :5]).logits[:, -1]
    expected = (first[0, 1] - first[0, 2] + second[0, 3] - second[0, 4] + second[1, 5] - second[1, 6]) / 3
    assert found.clean == pytest.approx(float(expected), rel=1e-5)


def test_a_callable_is_handed_the_batch_if_it_asks_for_it():
    model = tiny_model("gpt2")
    handed = []

    def of_both(logits, inputs):
        handed.append(inputs)
        return logits[:, 0, 0]

    def with_an_option(logits, scale=2.0):
        return scale * logits[:, 0, 0]

    one = score_heads(model, PADDED, of_both, positions=[0], layers=[0], progress=False)
    assert all(inputs.keys() == PADDED.keys() for inputs in handed)
    assert all(torch.equal(inputs[name], PADDED[name]) for inputs in handed for name in PADDED)
    two = score_heads(model, PADDED, with_an_option, positions=[0], layers=[0], progress=False)
    torch.testing.assert_close(two.scores["ov"], 2 * one.scores["ov"], equal_nan=True)
    assert one.scores["ov"][1:].isnan().all()


WRONG = {
    "method": {"method": "guess"},
    "circuits": {"circuits": ["qq"]},
    "circuits, as a string": {"circuits": "qk"},
    "circuits twice": {"circuits": ["qk", "qk"]},
    "freeze_type": {"freeze_type": "melt"},
    "kv_scope": {"kv_scope": "all"},
    "layer_indices": {"layers": [3]},
    "strength": {"strength": 2.0},
    "reference": {"freeze_type": "reference"},
    "progress": {"progress": 1},
    "positions": {"positions": "first"},
    "positions, a bool": {"positions": [True]},
    "positions, a number": {"positions": 3},
    "positions, bytes": {"positions": b"\x03"},
    "positions out of range": {"positions": [7]},
    "positions twice": {"positions": [6, -1]},
    "inputs": {"inputs": "words"},
    "inputs is empty": {"inputs": []},
    "inputs, floats": {"inputs": IDS.float()},
    "attention_mask": {"inputs": {"input_ids": IDS, "attention_mask": torch.ones(2, 3)}},
    "attention_mask without a real token": {"inputs": {"input_ids": IDS, "attention_mask": 0 * IDS}},
    "inputs hold a cache": {"inputs": {"input_ids": IDS, "past_key_values": DynamicCache()}},
    "GPT2LMHeadModel was given past, a list of tensors": {
        "inputs": {"input_ids": IDS, "past": [torch.ones(2, 4, 7, 8)]}
    },
    "labels": {"inputs": {"input_ids": IDS, "labels": IDS[:, 1:]}, "metric": "loss"},
    "metric": {"metric": "accuracy"},
    "targets": {"metric": "kl", "targets": 3},
    "targets of a callable": {"metric": lambda logits: logits, "targets": 3},
    "targets missing": {"metric": "probability"},
    "targets, one for two": {"metric": "logit_difference", "targets": 3},
    "targets, too many": {"metric": "probability", "targets": [1, 2, 3]},
    "targets out of range": {"metric": "probability", "targets": 97},
    "targets, floats": {"metric": "probability", "targets": 0.5},
    "row 0 of batch 0 has no next token": {"metric": "loss", "positions": "last"},
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_served_is_refused_before_anything_is_run(what):
    model = tiny_model("gpt2")

    def run(module, args, kwargs):
        raise AssertionError("the model was run")

    model.register_forward_pre_hook(run, with_kwargs=True)
    arguments = {"inputs": IDS, "metric": "kl", "progress": False, **WRONG[what]}
    with pytest.raises(InterventionError, match=what.split(",")[0].split(" ")[0]):
        score_heads(model, **arguments)


def test_a_head_that_cannot_be_frozen_alone_is_refused_before_anything_is_run():
    model = tiny_model("deepseek_v3")
    model.register_forward_pre_hook(lambda *args: pytest.fail("the model was run"))
    with pytest.raises(CircuitFreezeError, match="cannot give query heads"):
        score_heads(model, IDS, "kl", circuits=["k"], progress=False)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda logits: logits.sum(), r"gave torch.float32 \[\] .* one number a row, \[2\]"),
        (lambda logits: logits[:, 0, 0] * torch.nan, "is nan in batch 0, unfrozen"),
    ],
)
def test_a_metric_that_gives_no_number_a_row_is_refused(metric, message):
    with pytest.raises(InterventionError, match=message):
        score_heads(tiny_model("gpt2"), IDS, metric, progress=False)


def test_a_frozen_model_is_refused():
    model = tiny_model("gpt2")
    config = InterventionConfig([0], [0], "qk")
    with FREEZER.freeze_circuits(model, config), pytest.raises(InterventionError, match="model is frozen"):
        score_heads(model, IDS, "kl", progress=False)


def test_noise_without_a_spread_is_zero():
    model = tiny_model("gpt2")
    found = score_heads(model, IDS, "kl", freeze_type="noise", noise_std=0.0, progress=False).scores
    expected = score_heads(model, IDS, "kl", progress=False).scores
    assert all(torch.equal(found[circuit], expected[circuit]) for circuit in expected)


def test_strength_0_changes_nothing_and_is_run_once_a_layer():
    found = score_heads(tiny_model("gpt2"), IDS, "kl", strength=0.0, progress=False)
    assert all(float(scores.abs().max()) < 1e-6 for scores in found.scores.values())


def test_progress_is_shown_where_it_is_asked_for(capsys):
    model = tiny_model("gpt2")
    score_heads(model, IDS, "kl", progress=False)
    assert capsys.readouterr().err == ""
    score_heads(model, IDS, "kl", circuits=["qk"])
    assert "12/12" in capsys.readouterr().err


def test_a_frame_has_a_row_for_each_score(monkeypatch):
    scores = {"qk": torch.tensor([[1.0, torch.nan], [2.0, 3.0]], dtype=torch.float64)}
    made = {}

    class Pandas:
        @staticmethod
        def DataFrame(rows, columns):
            made.update(rows=rows, columns=columns)
            return made

    monkeypatch.setitem(sys.modules, "pandas", Pandas)
    assert HeadScores(scores, 0.0, "kl", "exact", 1).to_frame() is made
    assert made["columns"] == ["circuit", "layer", "head", "score", "exact"]
    assert made["rows"] == [("qk", 0, 0, 1.0, True), ("qk", 1, 0, 2.0, True), ("qk", 1, 1, 3.0, True)]
    HeadScores(scores, 0.0, "loss", "screened", 1, {"qk": scores["qk"] > 2.5}).to_frame()
    assert [row[-1] for row in made["rows"]] == [False, False, True]


def test_a_frame_without_pandas_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pytest-circuitfreeze\[studies\]"):
        HeadScores({}, 0.0, "kl", "exact", 1).to_frame()


def test_a_change_from_infinite_to_infinite_is_refused():
    model = tiny_model("gpt2")
    model.lm_head.register_forward_hook(
        lambda module, args, output: output.index_fill(-1, torch.tensor([7]), -torch.inf)
    )
    with pytest.raises(InterventionError, match="metric=loss is infinite in batch 0, both unfrozen and under"):
        score_heads(model, torch.tensor([[3, 7, 5]]), "loss", circuits=("ov",), progress=False)


@pytest.mark.parametrize("given", [None, "a lot", [[1.0], [2.0, 3.0]]])
def test_a_metric_that_gives_no_numbers_is_refused(given):
    with pytest.raises(InterventionError, match="must be one number a row"):
        score_heads(tiny_model("gpt2"), torch.tensor([[3, 7, 5]]), lambda logits: given, progress=False)
