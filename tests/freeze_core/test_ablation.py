"""The ablation study against a loop by hand, its intervals against draws by hand, and its tables as people see them."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from intervals import expanded
from scipy import stats
from torch import Tensor
from torch.nn import functional as F
from typesetting import typeset

from freeze_core import (
    AblationStudy,
    AttentionCircuitFreezer,
    ExperimentalInterventions,
    InterventionConfig,
    InterventionError,
    run_circuit_ablation_study,
)
from freeze_core.files import read_file, write_file
from freeze_core.results.intervals import Resampling
from freeze_core.scoring.batches import batches_of
from freeze_core.studies.next_token import sums
from pytest_circuitfreeze.models import tiny_model

DEFAULT = ["gpt2", "llama", "mistral_gqa", "falcon_mqa"]
GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randint(0, 60, (6, 9), generator=GENERATOR)
PADDED = {"input_ids": IDS[:3, :7], "attention_mask": (torch.arange(7) >= torch.tensor([[0], [3], [5]])).long()}


def study(model: Any, dataset: Any = IDS, *args: Any, **options: Any) -> AblationStudy:
    return run_circuit_ablation_study(model, dataset, *args, **{"progress": False, "resamples": 999} | options)


def by_hand(
    model: Any, batches: list[dict[str, Tensor]], circuit: str | None, fields: dict[str, Any]
) -> list[list[float]]:
    """For each sequence the losses of its real next tokens, token by token, as one writes it without a library."""
    losses = []
    for batch in batches:
        config = {"layer_indices": [0, -1], "head_indices": [1, 2], **fields}
        if circuit == "z":
            del config["layer_indices"], config["head_indices"]
            frozen = ExperimentalInterventions().freeze_attention_heads(model, {0: [1, 2], -1: [1, 2]}, **config)
        elif circuit:
            frozen = AttentionCircuitFreezer().freeze_circuits(model, InterventionConfig(circuit=circuit, **config))
        with torch.no_grad():
            logits = model(**batch).logits
        if circuit:
            frozen.remove()
        for row, ids in enumerate(batch["input_ids"]):
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[row]
            found = []
            for at in range(len(ids) - 1):
                if mask[at] and mask[at + 1]:
                    found.append(float(F.cross_entropy(logits[row, at].double(), ids[at + 1])))
            losses.append(found)
    return losses


@pytest.mark.parametrize("architecture", DEFAULT)
@pytest.mark.parametrize("freeze_type", ["zero", "mean"])
def test_numbers_are_those_of_a_loop_by_hand(architecture: str, freeze_type: str) -> None:
    model = tiny_model(architecture)
    fields = {"freeze_type": freeze_type, "strength": 0.75}
    batches = [{"input_ids": IDS}, PADDED]
    made = study(model, batches, [0, -1], [1, 2], circuits=["qk", "ov", "both", "q", "k", "v", "z"], **fields)
    clean = by_hand(model, batches, None, {})
    frame = made.to_frame().set_index("circuit")
    assert list(frame.index) == ["qk", "ov", "both", "q", "k", "v", "z"]
    assert set(frame.n) == {9}
    assert set(frame.tokens) == {6 * 8 + 6 + 3 + 1}
    assert frame.clean_perplexity["qk"] == pytest.approx(np.exp(np.mean([*chain(*clean)])), rel=1e-6)
    for circuit, row in frame.iterrows():
        losses = by_hand(model, batches, str(circuit), fields)
        assert row.perplexity == pytest.approx(np.exp(np.mean([*chain(*losses)])), rel=1e-6)
        changes = np.array([np.mean(new) - np.mean(old) for new, old in zip(losses, clean, strict=True)])
        assert row.effect_size == pytest.approx(changes.mean() / changes.std(ddof=1), rel=1e-3)


def test_accuracy_and_kl_are_those_of_a_loop_by_hand() -> None:
    model = tiny_model("llama_gqa")
    (row,) = study(model, IDS, [1], circuits=["ov"], freeze_type="resample").rows
    with torch.no_grad():
        clean = model(IDS).logits.double().log_softmax(-1)[:, :-1]
        config = InterventionConfig([1], circuit="ov", freeze_type="resample")
        with AttentionCircuitFreezer().freeze_circuits(model, config):
            found = model(IDS).logits.double().log_softmax(-1)[:, :-1]
    assert row.kl.value == pytest.approx(float((clean.exp() * (clean - found)).sum(-1).mean()), rel=1e-5)
    assert row.accuracy.value == float((found.argmax(-1) == IDS[:, 1:]).double().mean())
    assert row.kl.low < row.kl.value < row.kl.high


@pytest.mark.parametrize(("n", "least"), [(2, 0.5), (3, 0.75), (4, 0.875), (5, 0.91), (8, 0.91), (20, 0.93)])
def test_intervals_cover_what_they_say_of_few_sequences(n: int, least: float) -> None:
    """Of 4 and fewer, what the range of them covers: all but the cases in which they lie on one side."""
    times = 2000
    values = torch.randn(times, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    low, high = Resampling(0.95, 2000, 0).mean_intervals(values)
    covered = float(((low <= 0) & (high >= 0)).double().mean())
    bound = 4 * (least * (1 - least) / times) ** 0.5  # deviations of a binomial share
    assert least - bound <= covered <= 0.95 + bound
    if n < 5:
        assert covered <= least + bound


def test_intervals_and_tests_are_of_sequences() -> None:
    made = study(tiny_model("gpt2"), IDS, circuits=["ov", "qk"], resamples=500, resampling_seed=3, confidence=0.8)
    row = made.rows[0]
    losses, clean = made.sums["ov"].loss.numpy(), made.sums["clean"].loss.numpy()
    draws = np.random.default_rng(3).integers(0, 6, (500, 6))  # as scipy draws them
    drawn = np.exp(losses[draws].sum(1) / 48)
    assert row.perplexity[1:] == pytest.approx(expanded(drawn, 0.8, 6))
    signs = np.array(np.meshgrid(*[[1, -1]] * 6)).reshape(6, -1)
    means = ((losses - clean) / 8) @ signs / 6
    expected = 2 * min(np.mean(means >= means[0] - 1e-12), np.mean(means <= means[0] + 1e-12))
    assert row.p_value == pytest.approx(expected)
    ps = [one.p_value for one in made.rows]
    assert [one.p_adjusted for one in made.rows] == list(stats.false_discovery_control(ps, method="by"))
    assert made.clean.p_value == 1
    assert made.clean.kl == (0, 0, 0)


def test_a_freeze_that_does_nothing_has_no_effect() -> None:
    (row,) = study(tiny_model("gpt2"), circuits=["ov"], strength=0.0).rows
    assert (row.kl, row.effect_size) == ((0, 0, 0), (0, 0, 0))
    assert row.p_value == row.p_adjusted == 1


def test_a_study_is_made_again_from_its_file(tmp_path: Path) -> None:
    model = tiny_model("mistral_gqa")
    statistics = AttentionCircuitFreezer().calibrate(model, [IDS], progress=False)
    before = study(model, PADDED, [1], freeze_type="noise", statistics=statistics, seed=5, kv_scope="head")
    before.save(tmp_path / "study")
    loaded = AblationStudy.load(tmp_path / "study")
    assert loaded.to_frame().equals(before.to_frame())
    assert (loaded.to_markdown(), loaded.to_latex()) == (before.to_markdown(), before.to_latex())
    again = run_circuit_ablation_study(model, PADDED, progress=False, **loaded.settings)
    assert again.to_frame().equals(before.to_frame())
    assert again.origin == before.origin == loaded.origin
    other = study(tiny_model("llama_gqa"), {**PADDED, "input_ids": IDS[3:, :7]})
    assert other.origin["data"] != before.origin["data"]
    assert other.origin["identity"] != before.origin["identity"]
    assert other.origin["model"] == "LlamaForCausalLM"
    assert other.origin["dtype"] == "torch.float32"
    with pytest.raises(InterventionError, match=r"ablation study of .*nowhere: cannot be read"):
        AblationStudy.load(tmp_path / "nowhere")
    statistics.save(tmp_path / "study")
    with pytest.raises(InterventionError, match="must be 'circuitfreeze-ablation-study-1'"):
        AblationStudy.load(tmp_path / "study")


@pytest.mark.parametrize("circuit", ["qk", "ov", "z"])
def test_heads_may_be_of_each_layer(tmp_path: Path, circuit: str) -> None:
    model = tiny_model("mistral_gqa")
    made = study(model, IDS, heads={-1: [2], 0: [1, 0]}, circuits=[circuit], kv_scope="head")
    if circuit == "z":
        frozen = ExperimentalInterventions().freeze_attention_heads(model, {0: [0, 1], -1: [2]})
    else:
        configs = [InterventionConfig(*at, circuit, kv_scope="head") for at in (([0], [0, 1]), ([-1], [2]))]
        frozen = AttentionCircuitFreezer().freeze_circuits(model, configs)
    with frozen, torch.no_grad():
        logits = model(IDS).logits
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), IDS[:, 1:], reduction="none").double().sum(1)
    torch.testing.assert_close(made.sums[circuit].loss, losses, rtol=1e-5, atol=1e-5)
    made.save(tmp_path / "study")
    loaded = AblationStudy.load(tmp_path / "study")
    assert loaded.heads == made.heads
    assert loaded.settings["heads"] == made.heads
    last = model.config.num_hidden_layers - 1
    assert made.heads == {0: [0, 1], last: [2]}
    assert run_circuit_ablation_study(model, IDS, progress=False, **loaded.settings).to_frame().equals(made.to_frame())
    assert f"layer 0 query heads 0, 1, layer {last} query head 2, each circuit" in loaded.to_markdown()


def test_labels_of_padding_are_no_targets() -> None:
    model = tiny_model("llama_gqa")
    with_labels = study(model, {**PADDED, "labels": PADDED["input_ids"]}, circuits=["ov"])
    assert with_labels.targets.tolist() == [6, 3, 1]
    assert with_labels.to_frame().equals(study(model, PADDED, circuits=["ov"]).to_frame())


def test_what_is_infinite_has_no_mean() -> None:
    model = tiny_model("gpt2")
    model.lm_head.register_forward_hook(lambda module, args, output: output.index_fill(-1, IDS[2, 1:2], -torch.inf))
    with pytest.raises(InterventionError, match="metric=loss is inf for row 2 of batch 0, clean"):
        study(model, IDS)


def test_the_likeliest_is_told_of_logits_whose_logarithms_are_equal() -> None:
    logits = torch.zeros(1, 3, 50_000)
    logits[..., 5], logits[..., 7] = 1e-7, 2e-7
    (batch,) = batches_of(tiny_model("gpt2"), torch.full((1, 3), 7), "all")
    assert sums(batch, logits, logits).correct.tolist() == [2.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(6, dtype=torch.int64)}, "targets must be numbers of tokens"),
        ({"targets": torch.ones(6)}, "targets must be numbers of tokens"),
        ({"sums.qk.loss": torch.full((6,), torch.nan, dtype=torch.float64)}, "loss of qk must be finite numbers"),
        ({"sums.qk.kl": torch.zeros(5, dtype=torch.float64)}, "kl of qk must be finite numbers"),
        ({"sums.clean.kl": None}, "sums.clean.kl"),
        ({"config.statistics.0.q.mean": torch.zeros(1)}, "a tensor statistics.0.q.mean"),
    ],
)
def test_a_file_that_was_written_to_is_refused(tmp_path: Path, change: dict[str, Tensor | None], message: str) -> None:
    path = tmp_path / "study"
    study(tiny_model("gpt2"), IDS, circuits=["qk"]).save(path)
    tensors, facts = read_file(path, AblationStudy.file_format, "study")
    changed = {name: one for name, one in (tensors | change).items() if one is not None}
    write_file(
        path, AblationStudy.file_format, changed, {name: fact for name, fact in facts.items() if name != "format"}
    )
    with pytest.raises(InterventionError, match=message):
        AblationStudy.load(path)


def test_dropout_is_the_same_in_every_pass() -> None:
    model = tiny_model("gpt2").train()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    (row,) = study(model, [IDS[:3], IDS[3:]], circuits=["ov"], strength=0.0).rows
    assert row.kl == (0, 0, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


class Tokenizer:
    """One token a word."""

    pad_token: str | None = "."

    def __call__(self, texts: list[str], padding: bool, return_tensors: str) -> dict[str, Tensor]:
        words = [[len(word) for word in text.split()] for text in texts]
        longest = max(map(len, words))
        return {
            "input_ids": torch.tensor([each + [0] * (longest - len(each)) for each in words]),
            "attention_mask": torch.tensor([[1] * len(each) + [0] * (longest - len(each)) for each in words]),
            "token_type_ids": torch.zeros(len(words), longest),
        }


def test_texts_are_sequences() -> None:
    texts = ["a bb ccc", "dddd a", "bb ccc dddd a bb"]
    made = study(tiny_model("gpt2"), texts, circuits=["qk"], tokenizer=Tokenizer(), batch_size=2)
    assert made.targets.tolist() == [2, 1, 4]
    tokens = {**Tokenizer()(texts, True, "pt")}
    del tokens["token_type_ids"]
    whole = study(tiny_model("gpt2"), tokens, circuits=["qk"])
    assert torch.allclose(made.sums["qk"].loss, whole.sums["qk"].loss, rtol=1e-5)


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ([], {}, "dataset is empty"),
        (3, {}, "dataset=3: must be token ids, dicts of model arguments, or a list of texts"),
        (IDS[:1], {}, "dataset has one sequence"),
        (IDS[:, :1], {}, "row 0 of batch 0 of dataset has no next token"),
        ({"inputs_embeds": torch.zeros(2, 3, 8)}, {}, "batch 0 of dataset has no next tokens"),
        ("a text", {}, "dataset='a text': must be token ids, dicts of model arguments, or a list of texts"),
        (["a b", "c d"], {}, "tokenizer=None"),
        (IDS, {"tokenizer": Tokenizer()}, "tokenizer: must be None"),
        (["a b", 3], {"tokenizer": Tokenizer()}, "text 1 of dataset is 3"),
        (["a b", "c"], {"tokenizer": Tokenizer()}, "text 1 of dataset, 'c', makes 1 tokens"),
        (["a b", ""], {"tokenizer": Tokenizer()}, "text 1 of dataset, '', makes 0 tokens"),
        (["a b", "c d"], {"tokenizer": type("Bare", (Tokenizer,), {"pad_token": None})()}, "has no pad_token"),
        (IDS, {"circuits": "qk"}, "circuits='qk'"),
        (IDS, {"circuits": []}, "circuits"),
        (IDS, {"circuits": ["qk", "qk"]}, "must be a list of distinct ones"),
        (IDS, {"circuits": ["pattern"]}, "circuits"),
        (IDS, {"circuit": "qk"}, "circuit: unknown argument; allowed are .*circuits"),
        (IDS, {"colour": 1}, "colour: unknown argument; allowed are .*strength"),
        (IDS, {"layers": [9]}, "layer_indices"),
        (IDS, {"heads": [9]}, "head_indices"),
        (IDS, {"heads": {}}, "heads={}: must be a dict from layer to a list of heads"),
        (IDS, {"heads": {0: [1]}, "layers": [0]}, r"layers=\[0\]: must be None where heads"),
        (IDS, {"heads": {0: [1], -3: [2]}}, "names the same layer twice"),
        (IDS, {"heads": {0: [9]}}, "head_indices"),
        (IDS, {"strength": 2}, "strength=2"),
        (IDS, {"confidence": 95}, "confidence=95"),
        (IDS, {"resamples": 10}, "resamples=10"),
        (IDS, {"resampling_seed": -1}, "resampling_seed=-1"),
        (IDS, {"batch_size": 0}, "batch_size=0"),
        (IDS, {"progress": 1}, "progress=1"),
    ],
)
def test_bad_input_is_an_error_before_any_pass(dataset: Any, options: dict[str, Any], message: str) -> None:
    model = tiny_model("gpt2")
    model.forward = None
    with pytest.raises(InterventionError, match=message):
        study(model, dataset, **options)


def test_a_frozen_model_is_refused() -> None:
    model = tiny_model("gpt2")
    with (
        AttentionCircuitFreezer().freeze_circuits(model, InterventionConfig()),
        pytest.raises(InterventionError, match="model is frozen"),
    ):
        study(model)


def test_without_scipy_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=r"pip install 'pytest-circuitfreeze\[studies\]'"):
        study(None)


def test_progress_is_shown_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    study(tiny_model("gpt2"), [IDS[:3], IDS[3:]], circuits=["ov"])
    assert capsys.readouterr().err == ""
    study(tiny_model("gpt2"), [IDS[:3], IDS[3:]], circuits=["ov"], progress=True)
    assert "4/4" in capsys.readouterr().err  # of each batch a clean pass and a frozen one


def test_the_table_says_of_what_it_is() -> None:
    made = study(tiny_model("gpt2"), IDS, [0], [1, 2], circuits=["ov"])
    frame = made.to_frame()
    assert (frame.freeze_type[0], frame.kv_scope[0], frame.strength[0]) == ("zero", "group", 1)
    lines = made.to_markdown().splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:3]] == ["circuit", "perplexity"]
    clean, row = made.clean.perplexity, made.rows[0]
    assert lines[2].startswith(f"| clean     | {clean.value:.3g} [{clean.low:.3g}, {clean.high:.3g}]")
    assert f"| {row.kl.value:.3g} [{row.kl.low:.3g}, {row.kl.high:.3g}]" in lines[3]
    assert lines[-1].startswith(
        "GPT2LMHeadModel, layer 0, query heads 1, 2, each circuit frozen alone: zero, strength 1, kv_scope group. "
        "n = 6 sequences, 48 predicted tokens. In brackets 95 % expanded percentile"
    )


@pytest.mark.latex
def test_latex_compiles(tmp_path: Path) -> None:
    made = study(tiny_model("gpt2"), IDS, [0], [1, 2])
    made.origin["model"] = "My_Model"
    typeset(made.to_latex(), tmp_path)
    assert (tmp_path / "paper.pdf").stat().st_size > 10_000
