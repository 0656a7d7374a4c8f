"""A study of patches as people have it: its prompts, intervals, tables and file, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from intervals import expanded
from patched import CLEAN, CORRUPTED, LEFT, patched
from torch import Tensor
from typesetting import typeset

from freeze_core import (
    AttentionCircuitFreezer,
    InterventionConfig,
    InterventionError,
    PatchingStudy,
    UnsupportedModelError,
    patch_activations,
)
from freeze_core.files import read_file, write_file
from freeze_core.results.tables import Table
from pytest_circuitfreeze.models import tiny_model

FREEZER = AttentionCircuitFreezer()


def test_texts_are_prompts() -> None:
    class Tokenizer:
        pad_token = "."

        def __call__(self, texts: list[str], padding: bool, return_tensors: str) -> dict[str, Tensor]:
            words = [[len(word) for word in text.split()] for text in texts]
            most = max(map(len, words))
            return {
                "input_ids": torch.tensor([each + [0] * (most - len(each)) for each in words]),
                "attention_mask": torch.tensor([[1] * len(each) + [0] * (most - len(each)) for each in words]),
            }

    clean, corrupted = ["a bb ccc", "dddd a"], ["bb bb a", "a a"]
    model = tiny_model("gpt2")
    study = patched(model, clean, corrupted, tokenizer=Tokenizer(), by="position")
    tokens = [Tokenizer()(texts, True, "pt") for texts in (clean, corrupted)]
    assert torch.equal(study.values["z"], patched(model, *tokens, by="position").values["z"])
    with pytest.raises(InterventionError, match="attention_mask of batch 0 of clean is another than that of corrupted"):
        patched(model, clean, ["bb bb a", "a a a"], tokenizer=Tokenizer())
    with pytest.raises(InterventionError, match="text 1 of corrupted, '', makes 0 tokens: must make one at least"):
        patched(model, clean, ["bb bb a", ""], tokenizer=Tokenizer())


def test_intervals_are_of_prompts_drawn_anew() -> None:
    six = torch.randint(0, 60, (2, 6, 5), generator=torch.Generator().manual_seed(4))
    fields: dict[str, Any] = {"resamples": 500, "confidence": 0.8, "circuits": ["ov"]}
    study = patched(tiny_model("gpt2"), *six, resampling_seed=3, **fields)
    draws = np.random.default_rng(3).integers(0, 6, (500, 6))  # as scipy draws them
    changes = (study.values["ov"][1, 2] - study.corrupted).numpy()
    gaps = (study.clean - study.corrupted).numpy()
    effect, share = ([float(one[1, 2]) for one in getattr(study, name)["ov"]] for name in ("effect", "normalised"))
    assert effect == pytest.approx([changes.mean(), *expanded(changes[draws].mean(1), 0.8, 6)])
    shares = changes[draws].sum(1) / gaps[draws].sum(1)
    assert share == pytest.approx([changes.sum() / gaps.sum(), *expanded(shares, 0.8, 6)])
    assert study.gap.value == pytest.approx(gaps.mean())
    again = patched(tiny_model("gpt2"), *six, resampling_seed=3, **fields)
    assert again.to_frame().equals(study.to_frame())
    other = patched(tiny_model("gpt2"), *six, resampling_seed=4, **fields)
    assert torch.equal(other.effect["ov"].value, study.effect["ov"].value)
    assert not torch.equal(other.effect["ov"].low, study.effect["ov"].low)


def test_where_draws_may_have_no_gap_an_end_is_infinite() -> None:
    study = patched(tiny_model("gpt2"), CLEAN[:2], torch.cat([CLEAN[:1], CORRUPTED[1:2]]), metric=by_row, targets=None)
    assert bool((study.normalised["ov"].high == torch.inf).all())
    assert bool(study.normalised["ov"].low.isfinite().all())


def by_row(logits: Tensor) -> Tensor:
    """The same bits for the same row: no gap at all where both prompts are the same."""
    return (logits[:, -1, 5] - logits[:, -1, 7]).round(decimals=3)


def test_a_study_is_made_again_from_its_file(tmp_path: Path) -> None:
    model = tiny_model("mistral_gqa")
    targets = [[5, 7], [1, 2], [3, 4]]
    before = patched(model, by="position", layers=[0, -1], direction="noising", targets=targets, kv_scope="group")
    before.save(tmp_path / "study")
    loaded = PatchingStudy.load(tmp_path / "study")
    assert loaded.to_frame().equals(before.to_frame())
    assert (loaded.to_markdown(), loaded.to_latex()) == (before.to_markdown(), before.to_latex())
    again = patch_activations(model, CLEAN, CORRUPTED, progress=False, **loaded.settings)
    assert again.to_frame().equals(before.to_frame())
    assert again.origin == before.origin == loaded.origin
    assert patched(model, CORRUPTED, CLEAN).origin["data"] != before.origin["data"]
    assert list(loaded.to_frame().columns[:3]) == ["circuit", "layer", "position"]
    with pytest.raises(InterventionError, match=r"patching study of .*nowhere: cannot be read"):
        PatchingStudy.load(tmp_path / "nowhere")
    tensors, facts = read_file(tmp_path / "study", PatchingStudy.file_format, "study")
    del facts["format"]
    for change in (
        {"clean": torch.zeros(2)},
        {"values.z": tensors["values.z"][0]},
        {"corrupted": tensors["clean"][:2]},
    ):
        write_file(tmp_path / "study", PatchingStudy.file_format, tensors | change, facts)
        with pytest.raises(InterventionError, match="not what save writes"):
            PatchingStudy.load(tmp_path / "study")
    for name, value in (("direction", "sideways"), ("by", "layer"), ("kv_scope", "all"), ("metric", 3)):
        settings = json.dumps(json.loads(facts["settings"]) | {name: value})
        write_file(tmp_path / "study", PatchingStudy.file_format, tensors, facts | {"settings": settings})
        with pytest.raises(InterventionError, match=f"not what save writes .*{name}"):
            PatchingStudy.load(tmp_path / "study")
    write_file(tmp_path / "study", PatchingStudy.file_format, tensors, facts | {"origin": "[" * 200_000})
    with pytest.raises(InterventionError, match=r"not what save writes .*nested too deeply"):
        PatchingStudy.load(tmp_path / "study")


def test_the_frame_and_the_tables_say_of_what_they_are() -> None:
    study = patched(tiny_model("gpt2"), circuits=["ov"])
    frame = study.to_frame()
    assert len(frame) == 12
    row = frame[(frame.layer == 1) & (frame["head"] == 2)].iloc[0]
    assert row.effect == float(study.effect["ov"].value[1, 2])
    assert (row.normalised_low, row.normalised_high) == tuple(float(one[1, 2]) for one in study.normalised["ov"][1:])
    assert (row.n, row.metric, row.unit, row.direction) == (3, "logit_difference", "logits", "denoising")
    assert row.normalised == pytest.approx(row.effect / (row.clean - row.corrupted))
    lines = study.to_markdown(top=2).splitlines()
    assert len(lines) == 6
    best = frame.iloc[frame.effect.abs().argmax()]
    assert lines[2].startswith(f"| ov        | {best.layer}       | {best['head']}")
    assert f"{best.effect:.3g} [{best.effect_low:.3g}, {best.effect_high:.3g}]" in lines[2]
    assert lines[-1].startswith(
        "GPT2LMHeadModel, activation patching by head, denoising: the clean run into the corrupted one, normalised so "
        "that 0 is corrupted and 1 clean; kv_scope head. The 2 largest of 12 effects on logit_difference, which is "
    )
    assert "n = 3 pairs of prompts. In brackets 95 % expanded percentile bootstrap intervals over prompts" in lines[-1]
    assert len(study.to_markdown(top=None).splitlines()) == 16
    assert "All 12 effects on" in study.to_markdown(top=None)
    with pytest.raises(InterventionError, match="top=0: must be None or an int"):
        study.to_latex(top=0)


def test_names_are_printed_as_they_stand() -> None:
    study = patched(tiny_model("gpt2"), metric=lambda logits: logits[:, -1, 3], targets=None, circuits=["ov"])
    text = study.to_markdown(top=1)
    assert "effect (\\<lambda>)" in text.splitlines()[0]
    assert "effects on \\<lambda>, which" in text
    assert "effects on \\ensuremath{<}lambda\\ensuremath{>}, which" in study.to_latex(top=1)
    latex = Table(["[a]", "b"], [["[1]", "[2]"], ["*", "[3]"]], "\\ ^ ~ < >").latex()
    assert " {[}a]" in latex
    assert "\n {[}1] " in latex
    assert "& [2] " in latex
    assert "\n {*} " in latex
    expected = "\\textbackslash{} \\textasciicircum{} \\textasciitilde{} \\ensuremath{<} \\ensuremath{>}"
    assert f"\\caption{{{expected}}}" in latex
    assert "\\\\[" not in re.sub(r"\s", "", latex)


@pytest.mark.latex
def test_latex_compiles(tmp_path: Path) -> None:
    names = Table(["[a]", "b"], [["*", "<"], ["[1]", "^"]], "\\~^<>[]").latex()
    typeset(patched(tiny_model("gpt2")).to_latex() + names, tmp_path)


@pytest.mark.parametrize(("prompts", "run"), [(CLEAN, "clean"), (CORRUPTED, "corrupted")])
def test_what_is_infinite_has_no_mean(prompts: Tensor, run: str) -> None:
    model = tiny_model("gpt2")
    with torch.no_grad():
        of_run = model(prompts).logits[1, -1]

    def infinite(logits: Tensor) -> Tensor:
        return torch.where(torch.isclose(logits[:, -1], of_run, atol=1e-4).all(-1), torch.inf, 0.0)

    with pytest.raises(InterventionError, match=f"metric=infinite is inf for row 1 of batch 0, {run}:"):
        patched(model, metric=infinite, targets=None)


def test_without_a_gap_nothing_is_swept() -> None:
    model = tiny_model("gpt2")
    passes = []
    model.register_forward_pre_hook(lambda module, args: passes.append(args))
    with pytest.raises(InterventionError, match="the same in the mean: there is no gap between them"):
        patched(model, CLEAN, CLEAN)
    assert len(passes) == 2


@pytest.mark.parametrize(
    ("clean", "corrupted", "options", "message"),
    [
        ([], [], {}, "clean is empty"),
        (CLEAN, [], {}, "corrupted is empty"),
        (3, CORRUPTED, {}, "clean=3: must be token ids"),
        (CLEAN[:1], CORRUPTED[:1], {}, "clean has one prompt: must have two at least"),
        (CLEAN, CORRUPTED[:2], {}, r"input_ids of batch 0 of clean is \[3, 6\] and of corrupted \[2, 6\]"),
        (CLEAN, CORRUPTED[:, :5], {}, r"input_ids of batch 0 of clean is \[3, 6\] and of corrupted \[3, 5\]"),
        ([CLEAN, CLEAN], CORRUPTED, {}, "clean has 2 batches and corrupted 1"),
        (CLEAN, {"inputs_embeds": torch.zeros(3, 6, 32)}, {}, "input_ids of batch 0 of clean|inputs_embeds of batch 0"),
        (CLEAN, {"input_ids": CORRUPTED, "attention_mask": LEFT}, {}, "attention_mask of batch 0 of clean"),
        ({"input_ids": CLEAN, "attention_mask": LEFT}, CORRUPTED, {}, "attention_mask of batch 0 of clean"),
        ("a text", CORRUPTED, {}, "clean='a text': must be token ids, dicts of model arguments, or a list of texts"),
        (["a b", "c d"], CORRUPTED, {}, "tokenizer=None"),
        (CLEAN, CORRUPTED, {"tokenizer": len}, "tokenizer: must be None"),
        (CLEAN, CORRUPTED, {"by": "token"}, "by='token': must be one of head, position"),
        (CLEAN, CORRUPTED, {"by": "position", "attention": "cross"}, "must be 'self' with by='position'"),
        (CLEAN, CORRUPTED, {"direction": "both"}, "direction='both': must be one of denoising, noising"),
        (CLEAN, CORRUPTED, {"circuits": ["pattern"]}, "circuits"),
        (CLEAN, CORRUPTED, {"layers": [9]}, "layer_indices"),
        (CLEAN, CORRUPTED, {"layers": [9], "by": "position"}, "layer_indices"),
        (CLEAN, CORRUPTED, {"kv_scope": "all"}, "kv_scope='all'"),
        (CLEAN, CORRUPTED, {"attention": "self-attention"}, "attention="),
        (CLEAN, CORRUPTED, {"metric": "accuracy"}, "metric='accuracy'"),
        (CLEAN, CORRUPTED, {"targets": None}, "targets=None"),
        (CLEAN, CORRUPTED, {"targets": (5, 99_999)}, "must be ids in 0 to"),
        (CLEAN, CORRUPTED, {"positions": [6]}, "6 is out of range"),
        (CLEAN, CORRUPTED, {"confidence": 95}, "confidence=95"),
        (CLEAN, CORRUPTED, {"resamples": 10}, "resamples=10"),
        (CLEAN, CORRUPTED, {"resampling_seed": -1}, "resampling_seed=-1"),
        (CLEAN, CORRUPTED, {"batch_size": 0}, "batch_size=0"),
        (CLEAN, CORRUPTED, {"progress": 1}, "progress=1"),
    ],
)
def test_bad_input_is_an_error_before_any_pass(
    clean: Any, corrupted: Any, options: dict[str, Any], message: str
) -> None:
    model = tiny_model("gpt2")
    model.forward = None
    with pytest.raises(InterventionError, match=message):
        patched(model, clean, corrupted, **options)


def test_heads_that_cannot_be_told_apart_are_refused_before_any_pass() -> None:
    model = tiny_model("deepseek_v3")
    model.forward = None
    with pytest.raises(UnsupportedModelError):
        patched(model, circuits=["k"])


def test_a_frozen_model_is_refused() -> None:
    model = tiny_model("gpt2")
    with FREEZER.freeze_circuits(model, InterventionConfig()), pytest.raises(InterventionError, match="is frozen"):
        patched(model)


def test_without_scipy_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=r"pip install 'pytest-circuitfreeze\[studies\]'"):
        patched(None)
