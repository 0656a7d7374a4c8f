"""Freezes that go through the later layers as rows of one pass: what they give, when they do, and when they do not."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from one_by_one import one_by_one
from torch import nn

from freeze_core import AttentionCircuitFreezer, InterventionError, score_heads
from freeze_core.scoring import batch_passes
from freeze_core.scoring.batched_freezes import TOKENS, group_freezes
from pytest_circuitfreeze.models import tiny_model

IDS = torch.arange(14).view(2, 7) * 5 % 97


@pytest.fixture(autouse=True)
def hooks_stand_in_for_a_models_own_code(monkeypatch):
    """What a pass shows is looked at in code of torch and transformers alone; hooks imitate that, and count passes."""
    monkeypatch.setattr(batch_passes, "foreign_code", lambda model: None)


CIRCUITS = ("qk", "ov", "z")


def spread(logits):
    """A metric that every position and some words count in."""
    return logits[..., 5].sum(1) - logits[..., 7].sum(1)


@contextmanager
def watching(model):
    """The rows of every forward of each layer's MLP, by layer."""
    parts = [module for name, module in model.named_modules() if name.endswith((".mlp", ".mixer", ".fc1"))]
    rows = [[] for _ in parts]
    hooks = [
        part.register_forward_hook(lambda module, args, output, seen=seen: seen.append(len(args[0])))
        for part, seen in zip(parts, rows, strict=True)
    ]
    yield rows
    for hook in hooks:
        hook.remove()


def assert_right(model, inputs=None, positions="last", **fields):
    """Scores are those of one freeze a forward, to 1e-6 of the largest logit; the most rows that the last layer had."""
    given = inputs or [{"input_ids": IDS}]
    fields = {"kv_scope": "head", **fields}

    def at(batch):
        columns = torch.arange(batch["input_ids"].shape[1]).expand(len(batch["input_ids"]), -1)
        return columns if positions == "all" else columns[:, -1:]

    with watching(model) as rows:
        found = score_heads(model, given, spread, circuits=CIRCUITS, positions=positions, progress=False, **fields)
    expected = one_by_one(model, given, spread, CIRCUITS, at, range(3), 4, **fields)
    with torch.no_grad():
        scale = max(float(model(**one).logits.abs().max()) * at(one).shape[1] for one in given)
    for circuit in CIRCUITS:
        torch.testing.assert_close(found.scores[circuit], expected[circuit], rtol=0, atol=1e-6 * scale)
        assert float(found.scores[circuit].abs().max()) > 1e-4 * scale
    return max(rows[-1])


@pytest.mark.parametrize("scope", ["group", "head"])
@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "falcon_mqa", "gemma2"])
def test_scores_of_batched_freezes_equal_one_freeze_per_pass(name, positions, scope):
    assert assert_right(tiny_model(name), positions=positions, kv_scope=scope) >= 2 * 3


@pytest.mark.parametrize("kind", ["mean", "noise", "resample", "reference"])
def test_freeze_values_come_from_the_batch_alone(kind):
    model = tiny_model("llama_gqa")
    fields = {"reference": AttentionCircuitFreezer().record(model, IDS + 3)} if kind == "reference" else {"seed": 3}
    assert assert_right(model, freeze_type=kind, **fields) > 2


def test_padded_rows_and_batches_of_other_sizes_are_batched():
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    padded = {"input_ids": IDS, "attention_mask": mask}
    assert assert_right(tiny_model("llama_gqa"), [padded, {"input_ids": IDS[:1, :5]}]) > 2


def test_a_layer_runs_once_for_the_freezes_of_each_earlier_one():
    model = tiny_model("gpt2")
    with watching(model) as rows:
        score_heads(model, IDS, spread, positions="last", progress=False)
    looking = [[2] * 4, [2] * 4 + [2 * 3], [2] * 5 + [2 * 3]]  # the last: between two others
    eight = [2] * 8  # each freeze in its own layer
    together = 2 * 8
    assert rows == [looking[0] + eight, [*looking[1], together, *eight], [*looking[2], together, together, *eight]]


@pytest.mark.parametrize(
    ("freezes", "most", "sizes"), [(18, 9, [9, 9]), (8, 18, [8]), (10, 4, [3, 3, 4]), (5, 2, [1] * 5)]
)
def test_groups_are_as_few_and_as_even_as_possible(freezes, most, sizes):
    found = group_freezes(freezes, most)
    assert [len(places) for places in found] == sizes
    assert [place for places in found for place in places] == list(range(freezes))


def test_freezes_over_a_long_batch_run_one_by_one():
    ids = torch.arange(TOKENS // 3 + 1)[None] % 97
    for columns, stacked in ((TOKENS // 3, True), (TOKENS // 3 + 1, False)):
        model = tiny_model("gpt2")
        with watching(model) as rows:
            score_heads(model, ids[:, :columns], spread, positions="last", progress=False)
        assert (max(rows[2]) > 1) == stacked


def test_few_freezes_run_one_by_one():
    """It would take longer to find out whether they can be."""
    model = tiny_model("gpt2")
    with watching(model) as rows:
        score_heads(model, IDS, spread, circuits=("qk",), positions="last", progress=False)
    assert max(rows[2]) == 2


LEAKS = {
    "mean": lambda module, args, output: output + output.mean(0, keepdim=True),
    "largest": lambda module, args, output: output - output.amax(0, keepdim=True),
    "no difference yet": lambda module, args, output: output + (output[:1].abs() - 1e6).relu(),
    "columns that are large": lambda module, args, output: output * (1 + (output > output.std()).any(0)),
    "number": lambda module, args, output: output * (1 + len(output) / 10),
}


@pytest.mark.parametrize("place", ["transformer.h.2.mlp.act", "transformer.h.1.mlp"])
@pytest.mark.parametrize("leak", LEAKS)
def test_a_model_that_mixes_rows_runs_one_freeze_per_pass(leak, place):
    model = tiny_model("gpt2")
    model.get_submodule(place).register_forward_hook(LEAKS[leak])
    with watching(model) as rows:
        score_heads(model, IDS, spread, positions="last", progress=False)
    assert rows[2].count(2 * 8) == 0
    assert assert_right(model) == 2 * 3  # while it was looked at


def test_a_model_with_dropout_runs_one_freeze_per_pass():
    model = tiny_model("gpt2").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    with watching(model) as rows:
        score_heads(model, IDS, spread, progress=False)
    assert max(map(max, rows)) == 2


def test_running_statistics_never_see_spoiled_rows():
    """What looks whether rows are apart would leave nan in them for ever."""
    model = tiny_model("gpt2").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    norm = nn.BatchNorm1d(32)
    model.transformer.h[1].mlp.register_forward_hook(lambda module, args, output: norm(output.mT).mT)
    model.transformer.h[1].mlp.norm = norm
    with watching(model) as rows:
        score_heads(model, IDS, spread, progress=False)
    assert max(map(max, rows)) == 2
    assert bool(norm.running_mean.isfinite().all())


def test_arguments_without_rows_and_columns_are_not_batched():
    model = tiny_model("gpt2")
    given = {"input_ids": IDS, "position_ids": torch.arange(7)[None]}
    with watching(model) as rows:
        score_heads(model, given, spread, positions="last", progress=False)
    assert max(map(max, rows)) == 2


def test_a_continued_group_has_the_same_rows_whichever_are_left(tmp_path):
    """The clean pass stands in for the others, so that the products are of the same shape."""
    model = tiny_model("gpt2")
    given, calls = [], []
    model.transformer.h[2].register_forward_pre_hook(lambda module, args: given.append(args[0].clone()))

    def stacked():
        found = [states for states in given if len(states) == 2 * 8]
        given.clear()
        return found

    def stops(logits):
        calls.append(1)
        if len(calls) == 1 + 3:
            raise KeyboardInterrupt
        return spread(logits)

    def scored(path, metric=stops):
        return score_heads(model, IDS, metric, positions="last", checkpoint=path, progress=False).scores

    calls.extend([1] * 100)
    expected = scored(None)
    whole = stacked()
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        scored(tmp_path / "sweep")
    given.clear()
    found = scored(tmp_path / "sweep")
    left = stacked()
    assert all(torch.equal(found[circuit], expected[circuit]) for circuit in expected)
    assert len(left) == len(whole) == 2
    assert torch.equal(left[0][4:], whole[0][4:])  # all but the first two of the first layer
    assert torch.equal(left[0][:2], left[0][2:4])
    assert not torch.equal(left[0][:4], whole[0][:4])
    assert torch.equal(left[1], whole[1])


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize("rows", [2 * 3, 2 * 8])
def test_the_model_is_restored_when_a_group_fails(rows, error):
    model = tiny_model("gpt2")
    before = model(IDS).logits
    failing = []

    def fail(module, args):
        if len(args[0]) == rows and not failing:
            failing.append(1)
            raise error("stopped")

    hook = model.transformer.h[2].register_forward_pre_hook(fail)
    if rows == 2 * 3 and error is RuntimeError:  # while it was looked whether freezes can be stacked
        score_heads(model, IDS, spread, progress=False)
    else:
        with pytest.raises((error, InterventionError), match="stopped") as caught:
            score_heads(model, IDS, spread, progress=False)
        assert caught.tb  # which holds on to all that was running
    hook.remove()
    assert failing
    assert torch.equal(model(IDS).logits, before)
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_a_metric_that_raises_leaves_the_model_as_it_was_while_its_error_is_held():
    model = tiny_model("gpt2")
    calls = []

    def failing(logits):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return spread(logits)

    with pytest.raises(KeyboardInterrupt) as caught:
        score_heads(model, IDS, failing, progress=False)
    assert caught.tb
    assert all("forward" not in vars(module) for module in model.modules())
