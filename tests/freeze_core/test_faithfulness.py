"""Faithfulness and completeness against freezes by hand, what must hold of them exactly, and their tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interrupted import stopped_at
from intervals import expanded
from torch import Tensor, nn
from typesetting import typeset

from freeze_core import (
    AttentionCircuitFreezer,
    ExperimentalInterventions,
    Faithfulness,
    InterventionConfig,
    InterventionError,
    UnsupportedModelError,
    measure_faithfulness,
)
from freeze_core.files import read_file, write_file
from pytest_circuitfreeze.models import tiny_model

FREEZER = AttentionCircuitFreezer()
TARGETS = (5, 7)
IDS, OTHERS = torch.randint(0, 60, (2, 4, 6), generator=torch.Generator().manual_seed(0))
LEFT = (torch.arange(6) >= torch.tensor([[0], [2], [3], [1]])).long()
HEADS = {0: [1], -1: [-4, 2]}
KEPT = {0: [1], 2: [0, 2]}
REST = {0: [0, 2, 3], 1: [0, 1, 2, 3], 2: [1, 3]}
EVERY = {layer: [0, 1, 2, 3] for layer in range(3)}


def measured(
    model: Any, inputs: Any = IDS, heads: Any = HEADS, metric: Any = "logit_difference", **options: Any
) -> Any:
    targets = TARGETS if isinstance(metric, str) else None
    return measure_faithfulness(
        model, inputs, heads, metric, **{"targets": targets, "progress": False, "resamples": 199} | options
    )


def by_hand(model: Any, frozen: dict[int, list[int]], circuit: str, fields: dict[str, Any], **given: Tensor) -> Tensor:
    """The metric at the last column `[prompt]` with `frozen` heads frozen, as one writes it with the freezer."""
    if circuit == "z":
        handles: Any = ExperimentalInterventions().freeze_attention_heads(model, frozen, **fields) if frozen else None
    else:
        configs = [
            InterventionConfig([layer], heads, circuit, kv_scope="head", **fields) for layer, heads in frozen.items()
        ]
        handles = FREEZER.freeze_circuits(model, configs) if configs else None
    with torch.no_grad():
        last = model(**given).logits[:, -1].double()
    if handles:
        handles.remove()
    return last[:, TARGETS[0]] - last[:, TARGETS[1]]


KINDS: dict[str, Callable[[Any, dict[str, Tensor]], dict[str, Any]]] = {
    "zero": lambda model, other: {"freeze_type": "zero"},
    "mean": lambda model, other: {"freeze_type": "mean", "strength": 0.75},
    "calibrated": lambda model, other: {
        "freeze_type": "mean",
        "statistics": FREEZER.calibrate(model, [other], progress=False),
    },
    "noise": lambda model, other: {"freeze_type": "noise", "seed": 3, "noise_std": 0.5},
    "resample": lambda model, other: {"freeze_type": "resample", "seed": 4},
    "reference": lambda model, other: {"freeze_type": "reference", "reference": FREEZER.record(model, other)},
}


@pytest.mark.parametrize("circuit", ["z", "qk", "ov", "both"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gpt2", "llama_gqa"])
def test_the_four_runs_are_those_of_freezes_by_hand(name: str, kind: str, circuit: str) -> None:
    model = tiny_model(name)
    given, other = ({"input_ids": ids, "attention_mask": LEFT} for ids in (IDS, OTHERS))
    if kind == "resample":
        given = {"input_ids": IDS}
    fields = KINDS[kind](model, other)
    options = {one: value for one, value in fields.items() if one != "reference"}
    found = measured(model, given, circuit=circuit, corrupted=other if kind == "reference" else None, **options)
    expected = {
        run: by_hand(model, frozen, circuit, fields, **given)
        for run, frozen in {"model": {}, "empty": EVERY, "circuit": REST, "complement": KEPT}.items()
    }
    for run, rows in expected.items():
        torch.testing.assert_close(found.values[run], rows, rtol=0, atol=1e-5)
    gap = (expected["model"] - expected["empty"]).mean()
    for run, ratio in (("circuit", found.faithfulness), ("complement", found.completeness)):
        share = float((expected[run] - expected["empty"]).mean() / gap)
        assert ratio.value == pytest.approx(share, abs=1e-5 * (1 + abs(share)) / abs(float(gap)))
    assert found.gap.value == pytest.approx(float(gap), abs=1e-5)


def test_all_heads_are_faithful_and_leave_nothing() -> None:
    found = measured(tiny_model("gpt2"), heads=EVERY, freeze_type="zero")
    assert torch.equal(found.values["circuit"], found.values["model"])
    assert torch.equal(found.values["complement"], found.values["empty"])
    assert (found.faithfulness, found.completeness) == ((1, 1, 1), (0, 0, 0))


def test_a_set_and_the_others_change_places() -> None:
    model = tiny_model("mistral_gqa")
    one, other = measured(model, heads=KEPT, circuit="ov"), measured(model, heads=REST, circuit="ov")
    assert torch.equal(one.values["circuit"], other.values["complement"])
    assert torch.equal(one.values["complement"], other.values["circuit"])
    assert one.faithfulness == other.completeness


def test_a_reference_on_the_same_prompts_keeps_everything_and_so_tells_nothing() -> None:
    with pytest.raises(InterventionError, match="both unfrozen and with all heads frozen, the same in the mean"):
        measured(tiny_model("gpt2"), freeze_type="reference", corrupted=IDS)


def test_corrupted_prompts_are_of_each_batch() -> None:
    model = tiny_model("llama_gqa")
    inputs, corrupted = [IDS, IDS[:2, :4]], [OTHERS, OTHERS[:2, :4]]
    found = measured(model, inputs, freeze_type="reference", corrupted=corrupted)
    parts = [
        measured(model, one, freeze_type="reference", corrupted=other)
        for one, other in zip(inputs, corrupted, strict=True)
    ]
    for run, rows in found.values.items():
        assert torch.equal(rows, torch.cat([part.values[run] for part in parts]))
    assert found.n == 6


def test_intervals_are_of_prompts_drawn_anew() -> None:
    found = measured(tiny_model("gpt2"), freeze_type="zero", resamples=500, resampling_seed=3, confidence=0.8)
    draws = np.random.default_rng(3).integers(0, 4, (500, 4))  # as scipy draws them
    model, empty, circuit, complement = (one.numpy() for one in found.values.values())
    gap = (model - empty)[draws].sum(1)
    for rows, ratio in ((circuit, found.faithfulness), (complement, found.completeness)):
        assert list(ratio[1:]) == pytest.approx(expanded((rows - empty)[draws].sum(1) / gap, 0.8, 4))
    assert list(found.means["circuit"][1:]) == pytest.approx(expanded(circuit[draws].mean(1), 0.8, 4))
    again = measured(tiny_model("gpt2"), freeze_type="zero", resamples=500, resampling_seed=3, confidence=0.8)
    assert again.to_frame().equals(found.to_frame())
    made_again = measure_faithfulness(tiny_model("gpt2"), IDS, progress=False, **found.settings)
    assert made_again.to_frame().equals(found.to_frame())
    assert made_again.origin == found.origin


def test_the_frame_and_the_tables_say_of_what_they_are() -> None:
    model = tiny_model("gpt2")
    found = measured(model, statistics=FREEZER.calibrate(model, [OTHERS], progress=False))
    frame = found.to_frame().set_index("quantity")
    assert list(frame.index) == ["model", "empty", "circuit", "complement", "gap", "faithfulness", "completeness"]
    assert frame.value["faithfulness"] == found.faithfulness.value
    assert (frame.low["model"], frame.high["model"]) == found.means["model"][1:]
    assert list(frame.unit) == ["logits"] * 5 + ["ratio"] * 2
    assert set(frame.n) == {4}
    lines = found.to_markdown().splitlines()
    value, low, high = found.faithfulness
    assert f"| faithfulness, of the set alone           | {value:.3g} [{low:.3g}, {high:.3g}]" in lines[7]
    assert lines[-1] == (
        "GPT2LMHeadModel, z of 3 of 12 heads (layer 0: 1; layer 2: 0, 2): mean of calibrated statistics, strength 1, "
        "kv_scope head. m is logit_difference; n = 4 prompts. In brackets 95 % expanded percentile bootstrap "
        "intervals over prompts."
    )
    assert found.settings["heads"] == {0: [1], 2: [0, 2]}
    assert list(measured(model, heads={2: [1], 0: [3]}).settings["heads"]) == [0, 2]
    assert {"model", "identity", "data", "statistics", "torch"} <= found.origin.keys()


def test_a_result_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    model = tiny_model("mistral_gqa")
    statistics = FREEZER.calibrate(model, [OTHERS], progress=False)
    before = measured(model, statistics=statistics, circuit="ov", targets=[[5, 7]] * 4, positions=[-1])
    before.save(tmp_path / "faithfulness")
    loaded = Faithfulness.load(tmp_path / "faithfulness")
    assert loaded.to_frame().equals(before.to_frame())
    assert (loaded.to_markdown(), loaded.to_latex()) == (before.to_markdown(), before.to_latex())
    assert loaded.settings == before.settings
    assert (loaded.all_heads, loaded.origin) == (before.all_heads, before.origin)
    for run, rows in before.values.items():
        assert torch.equal(loaded.values[run], rows)
    again = measure_faithfulness(model, IDS, statistics=statistics, progress=False, **loaded.settings)
    assert again.to_frame().equals(before.to_frame())
    with pytest.raises(InterventionError, match=r"faithfulness of .*nowhere: cannot be read"):
        Faithfulness.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("tensors", "facts", "message"),
    [
        ({"values.empty": torch.zeros(3, dtype=torch.float64)}, {}, r"empty must be finite numbers \[4\]"),
        ({"values.circuit": torch.full((4,), torch.nan, dtype=torch.float64)}, {}, "circuit must be finite numbers"),
        ({"values.model": torch.zeros(4)}, {}, "model must be finite numbers"),
        ({"values.complement": None}, {}, "values.complement"),
        ({}, {"all_heads": '"many"'}, "heads by layer"),
        ({}, {"settings": "{}"}, "confidence"),
        ({}, {"settings": "[" * 200_000}, "nested too deeply"),
        ({}, {"origin": "{}"}, "model"),
        ({}, {"heads": [["first", [1]]]}, "heads by layer"),
        ({}, {"strength": "full"}, "strength='full'"),
        ({}, {"metric": 3}, "metric=3"),
    ],
)
def test_a_file_of_something_else_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor | None], facts: dict[str, Any], message: str
) -> None:
    path = tmp_path / "faithfulness"
    measured(tiny_model("gpt2")).save(path)
    whole, texts = read_file(path, Faithfulness.file_format, "faithfulness")
    texts.pop("format")
    settings = json.loads(texts["settings"])
    texts["settings"] = json.dumps(settings | {name: facts[name] for name in facts.keys() & settings.keys()})
    texts |= {name: facts[name] for name in facts.keys() - settings.keys()}
    write_file(
        path,
        Faithfulness.file_format,
        {name: rows for name, rows in (whole | tensors).items() if rows is not None},
        texts,
    )
    with pytest.raises(InterventionError, match=f"not what save writes .*{message}"):
        Faithfulness.load(path)


@pytest.mark.latex
def test_latex_compiles(tmp_path: Path) -> None:
    typeset(measured(tiny_model("gpt2")).to_latex(), tmp_path)


def test_dropout_is_the_same_in_every_pass_and_generators_are_put_back() -> None:
    model = tiny_model("gpt2").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    torch.manual_seed(1)
    state = torch.get_rng_state()
    corrupted = torch.cat([IDS[:1], OTHERS[1:]])
    found = measured(model, [IDS, IDS], freeze_type="reference", corrupted=[corrupted, corrupted])
    for rows in found.values.values():  # the first prompt is held at what it is
        torch.testing.assert_close(rows[::4], found.values["model"][::4], rtol=0, atol=1e-5)
        assert not torch.equal(rows[:4], rows[4:])  # batches draw each their own
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_kl_is_from_the_unfrozen_model() -> None:
    found = measured(tiny_model("gpt2"), metric="kl", targets=None)
    assert found.values["model"].tolist() == [0, 0, 0, 0]
    assert bool((found.values["empty"] > 0).all())


def test_after_an_error_the_model_is_what_it_was() -> None:
    model = tiny_model("llama_gqa")
    stopped_at(3, model, lambda metric: measured(model, metric=metric))


def test_what_is_infinite_has_no_mean() -> None:
    def infinite(logits: Tensor) -> Tensor:
        return torch.tensor([0.0, 0.0, torch.inf, 0.0])

    with pytest.raises(InterventionError, match="metric=infinite is inf for row 2 of batch 0, model"):
        measured(tiny_model("gpt2"), metric=infinite)


@pytest.mark.parametrize(
    ("inputs", "heads", "options", "message"),
    [
        ([], HEADS, {}, "inputs is empty"),
        (IDS[:1], HEADS, {}, "inputs has one prompt: must have two at least"),
        (IDS, {}, {}, "heads={}: must be a dict from layer"),
        (IDS, [1, 2], {}, r"heads=\[1, 2\]: must be a dict from layer"),
        (IDS, {0: []}, {}, "head_indices"),
        (IDS, {0: [4]}, {}, "head_indices"),
        (IDS, {3: [0]}, {}, "layer_indices"),
        (IDS, {2: [0], -1: [1]}, {}, "names the same layer twice"),
        (IDS, HEADS, {"circuit": "pattern"}, "circuits"),
        (IDS, HEADS, {"freeze_type": "median"}, "freeze_type='median'"),
        (IDS, HEADS, {"freeze_type": "reference"}, "corrupted=None: freeze_type 'reference' needs prompts"),
        (IDS, HEADS, {"corrupted": OTHERS}, "corrupted: must be None under freeze_type"),
        (IDS, HEADS, {"freeze_type": "reference", "corrupted": OTHERS[:, :5]}, "input_ids of batch 0 of inputs"),
        (IDS, HEADS, {"strength": 2}, "strength=2"),
        (IDS, HEADS, {"statistics": 3}, "statistics=3"),
        (IDS, HEADS, {"metric": "accuracy"}, "metric='accuracy'"),
        (IDS, HEADS, {"targets": None}, "targets=None"),
        (IDS, HEADS, {"positions": [6]}, "6 is out of range"),
        (IDS, HEADS, {"confidence": 95}, "confidence=95"),
        (IDS, HEADS, {"batch_size": 0}, "batch_size=0"),
        (IDS, HEADS, {"progress": 1}, "progress=1"),
        (["a b", "c d"], HEADS, {}, "tokenizer=None"),
    ],
)
def test_bad_input_is_an_error_before_any_pass(inputs: Any, heads: Any, options: dict[str, Any], message: str) -> None:
    model = tiny_model("gpt2")
    model.forward = None
    with pytest.raises(InterventionError, match=message):
        measured(model, inputs, heads, **options)


def test_heads_that_cannot_be_told_apart_are_refused_before_any_pass() -> None:
    model = tiny_model("deepseek_v3")
    model.forward = None
    with pytest.raises(UnsupportedModelError):
        measured(model, heads={0: [1]}, circuit="k")


def test_a_frozen_model_is_refused() -> None:
    model = tiny_model("gpt2")
    with FREEZER.freeze_circuits(model, InterventionConfig()), pytest.raises(InterventionError, match="is frozen"):
        measured(model)
