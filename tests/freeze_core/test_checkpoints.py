"""A sweep that was stopped goes on from its checkpoint to the bits that it would have given; no other sweep does."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from freeze_core import AttentionCircuitFreezer, InterventionError, score_heads
from freeze_core.scoring import batch_passes
from freeze_core.scoring.distributed import Processes
from freeze_core.scoring.progress import FORMAT, Progress, _norm
from pytest_circuitfreeze.models import tiny_model

IDS = torch.arange(14).view(2, 7) * 5 % 97
BATCHES = [IDS, IDS[:1, :5], IDS + 3]
OTHER = AttentionCircuitFreezer().record


class Stops:
    """A metric that raises when it is taken for the `when`th time, and counts."""

    __qualname__ = __name__ = "spread"

    def __init__(self, when=None, error=KeyboardInterrupt):
        self.when, self.error, self.calls = when, error, 0

    def __call__(self, logits):
        self.calls += 1
        if self.calls == self.when:
            raise self.error("stopped")
        return logits[..., 5].sum(1) - logits[..., 7].sum(1)


def scored(model, path, metric="kl", inputs=BATCHES, **fields):
    return score_heads(model, inputs, metric, checkpoint=path, progress=False, **fields)


def same(found, expected):
    assert (found.clean, found.rows, found.metric) == (expected.clean, expected.rows, expected.metric)
    for circuit, scores in expected.scores.items():
        assert torch.equal(found.scores[circuit].nan_to_num(7e7), scores.nan_to_num(7e7)), circuit


def done(path):
    with safe_open(path, "pt") as file:
        return int((~file.get_tensor("changes").isnan()).sum())


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("positions", ["last", "all"])
@pytest.mark.parametrize("name", ["gpt2", "llama_gqa"])
def test_a_sweep_that_was_stopped_goes_on_to_the_same_bits(name, positions, error, tmp_path):
    model, path = tiny_model(name), tmp_path / "sweep"
    whole = scored(model, None, Stops(), positions=positions)
    kept = []
    for when in (1, 2, 7, 26, 28):
        stops = Stops(when, error)
        with pytest.raises(error, match="stopped"):
            scored(model, path, stops, positions=positions)
        kept.append(done(path))
    assert kept == [0, 0, 5, 5 + 19 + 4, 24 + 24 + 4]  # calls before the one that raised, but for the clean passes'
    last = Stops()
    same(scored(model, path, last, positions=positions), whole)
    assert last.calls == 3 + 20  # the clean passes, and what was left
    again = Stops()
    same(scored(model, path, again, positions=positions), whole)
    assert again.calls == 3
    assert [file.name for file in tmp_path.iterdir()] == ["sweep"]


def test_what_is_left_alone_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr(batch_passes, "foreign_code", lambda model: None)  # hooks count here
    model, path = tiny_model("gpt2"), tmp_path / "sweep"
    with pytest.raises(KeyboardInterrupt):
        scored(model, path, Stops(2 * 25 + 1 + 20), positions="last")  # the last of the third batch's third layer
    before = done(path)
    assert 48 + 16 <= before < 72
    runs, products = [], []
    model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda module, args, output: runs.append(1))
    original = model.lm_head.forward
    model.lm_head.forward = lambda states: (products.append(tuple(states.shape[:2])), original(states))[1]
    scored(model, path, Stops(), positions="last")
    assert len(runs) == 3 + 3  # the clean passes; three that look at the last batch
    # Clean, clean, clean, two and three to find out, and the passes of a layer, those that are left out as zeros.
    assert products == [(2, 7), (1, 5), (2, 7), (4, 1), (6, 1), (16, 1)]


def test_a_sweep_is_kept_from_time_to_time(tmp_path, monkeypatch):
    model, path = tiny_model("gpt2"), tmp_path / "sweep"
    now, kept = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def slow(logits):
        now[0] += 1.0
        kept.append(done(path) if path.exists() else None)
        return logits[:, 0, 0]

    scored(model, path, slow, IDS)
    assert kept[:6] == [None] * 6
    assert kept[6:12] == [5] * 6
    assert kept[-1] == 23
    assert len(set(kept)) == 5
    assert done(path) == 24


def in_training(model, **fields):
    torch.manual_seed(fields.pop("seeded", 3))
    return scored(model, **fields)


def test_a_model_in_training_draws_as_before(tmp_path):
    model, path = tiny_model("gpt2").train(), tmp_path / "sweep"
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    whole = in_training(model, path=None, metric=Stops())
    with pytest.raises(KeyboardInterrupt):
        in_training(model, path=path, metric=Stops(40))
    same(in_training(model, path=path, metric=Stops()), whole)
    with pytest.raises(
        InterventionError,
        match=r"checkpoint: the passes over batch 0 draw \(dropout\) from other states .* as when it was begun",
    ):
        in_training(model, path=path, metric=Stops(), seeded=4)


def changed(model):
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[3, 4] += 1e-6
    return model


def with_activation(model):
    model.config.activation_function = "relu"
    return model


def elsewhere(logits):
    return logits[:, 0, 0]


GPT2 = {"model": lambda: tiny_model("gpt2"), "metric": "kl", "inputs": BATCHES}
OTHERS = {
    "model's class": {"model": lambda: tiny_model("llama_gqa")},
    "model's config": {"model": lambda: with_activation(tiny_model("gpt2"))},
    "model's parameters": {"model": lambda: changed(tiny_model("gpt2"))},
    "training mode": {"model": lambda: tiny_model("gpt2").train()},
    "metric": {"metric": "loss"},
    "metric, a callable": {"metric": elsewhere},
    "inputs": {"inputs": [IDS, IDS[:1, :5], IDS + 4]},
    "inputs, in another order": {"inputs": [IDS, IDS + 3, IDS[:1, :5]]},
    "inputs, padded": {"inputs": [IDS, IDS[:1, :5], {"input_ids": IDS + 3, "attention_mask": IDS != 0}]},
    "inputs, with labels": {"inputs": [IDS, IDS[:1, :5], {"input_ids": IDS + 3, "use_cache": False, "labels": IDS}]},
    "positions": {"positions": "last"},
    "heads, circuits": {"circuits": ["ov", "qk"]},
    "heads, layers": {"layers": [0, 1]},
    "heads, scope": {"kv_scope": "group"},
    "heads, freeze_type": {"freeze_type": "mean"},
    "heads, strength": {"strength": 0.5},
    "heads, seed": {"freeze_type": "noise", "seed": 5},
    "heads, reference": {"freeze_type": "reference", "reference": IDS},
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A checkpoint of `GPT2`, written as one of other versions would be, too."""
    path = tmp_path_factory.mktemp("begun") / "sweep"
    scored(GPT2["model"](), path)
    return path


@pytest.mark.parametrize("what", OTHERS)
def test_a_checkpoint_of_another_sweep_is_refused(what, begun, tmp_path):
    before = begun.read_bytes()
    asked = {**GPT2, **OTHERS[what]}
    model = asked.pop("model")()
    if "reference" in asked:
        asked["reference"] = OTHER(model, asked["reference"])
    with pytest.raises(InterventionError, match=r"of another sweep; what differs, there and here: .*") as refused:
        scored(model, begun, **asked)
    assert what.split(",")[0] in str(refused.value).split("there and here: ")[1]
    assert str(begun) in str(refused.value)
    assert begun.read_bytes() == before


def test_what_differs_is_named_alone(begun):
    for what in ("metric", "model's parameters", "positions"):
        asked = {**GPT2, **OTHERS[what]}
        with pytest.raises(InterventionError) as refused:
            scored(asked.pop("model")(), begun, **asked)
        named = str(refused.value).split("there and here: ")[1]
        assert named.startswith(f"{what} (")
        assert named.count(", and ") == 1


def test_another_reference_is_another_sweep(tmp_path):
    model, path = tiny_model("gpt2"), tmp_path / "sweep"
    fields = {"inputs": IDS, "freeze_type": "reference"}
    scored(model, path, reference=OTHER(model, IDS + 1), **fields)
    scored(model, path, reference=OTHER(model, IDS + 1), **fields)
    with pytest.raises(InterventionError, match="there and here: heads, circuits and freezes"):
        scored(model, path, reference=OTHER(model, IDS + 2), **fields)


def test_other_versions_and_what_the_weights_do_not_tell_are_refused(begun, tmp_path):
    path = tmp_path / "sweep"
    with safe_open(begun, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        facts = file.metadata()
    question = json.loads(facts["question"])
    question["versions"] = question["versions"].replace("torch 2", "torch 1")
    save_file(tensors, path, {**facts, "format": FORMAT, "question": json.dumps(question)})  # as it was before digests
    with pytest.raises(InterventionError, match=r"there and here: versions \(pytest-circuitfreeze .*torch 1.*torch 2"):
        scored(tiny_model("gpt2"), path)
    model = tiny_model("gpt2")
    model.transformer.ln_f.register_forward_hook(lambda module, args, output: output * 1.001)
    with pytest.raises(InterventionError, match=r"the norm of the clean logits over batch 0 is .*hooks and adapters"):
        scored(model, begun)


def test_the_norm_of_clean_logits_that_are_nowhere_finite_is_a_number():
    logits = torch.tensor([[[3.0, torch.nan]], [[4.0, 0.0]]])
    assert _norm(logits) == 5.0
    logits[0, 0, 0] = torch.inf
    assert _norm(logits.bfloat16()) == torch.inf


def altered(begun, how):
    raw = begun.read_bytes()
    return {"cut": raw[:-9], "empty": b"", "no safetensors": b"\x80\x04pickle", "header": raw[:12] + b"x" + raw[13:]}[
        how
    ]


@pytest.mark.parametrize("how", ["cut", "empty", "no safetensors", "header"])
def test_a_file_that_cannot_be_read_is_refused_and_left_alone(how, begun, tmp_path):
    path = tmp_path / "sweep"
    path.write_bytes(altered(begun, how))
    with pytest.raises(InterventionError, match=r"checkpoint of .*sweep: cannot be read as safetensors"):
        scored(tiny_model("gpt2"), path)
    assert path.read_bytes() == altered(begun, how)


@pytest.mark.parametrize(
    ("facts", "tensors", "message"),
    [
        ({"format": "circuitfreeze-statistics-1"}, {}, "format 'circuitfreeze-statistics-1', must be"),
        ({"question": "{"}, {}, "does not say what it is of"),
        ({}, {"changes": torch.zeros(2, 24, dtype=torch.float64)}, r"holds \{'changes': 'torch.float64 \[2, 24\]'"),
        ({}, {"clean": torch.zeros(3)}, "holds"),
    ],
)
def test_a_file_of_something_else_is_refused(facts, tensors, message, begun, tmp_path):
    path = tmp_path / "sweep"
    with safe_open(begun, "pt") as file:
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        save_file({**held, **tensors}, path, {**file.metadata(), "format": FORMAT, **facts})
    with pytest.raises(InterventionError, match=message):
        scored(tiny_model("gpt2"), path)


def test_a_place_for_no_file_is_refused_before_anything_is_run(tmp_path):
    model = tiny_model("gpt2")
    model.register_forward_pre_hook(lambda *args: pytest.fail("the model was run"))
    for path in (tmp_path, tmp_path / "missing" / "sweep", 3, True):
        with pytest.raises(InterventionError, match="checkpoint="):
            scored(model, path)


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "sweep"
    progress = Progress(1, 2, {"metric": "kl"}, Processes(False), path)
    progress.save()
    before = path.read_bytes()
    progress.add(0, 1, 2.0)

    def full(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InterventionError, match=r"checkpoint of .*sweep: cannot be written \(no space left\)"):
        progress.save()
    assert [one.name for one in tmp_path.iterdir()] == ["sweep"]
    assert path.read_bytes() == before
