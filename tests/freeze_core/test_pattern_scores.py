"""Pattern scores against loops by hand, and both kinds of scores on heads that were planted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from freeze_core import (
    AttentionCircuitFreezer,
    HeadMeasures,
    InterventionConfig,
    InterventionError,
    copying_scores,
    pattern_scores,
)
from freeze_core.results.estimators import mean
from freeze_core.results.intervals import Resampling
from pytest_circuitfreeze.loading import SMOLLM2, ModelLoadError, load_model, smollm2_gguf
from pytest_circuitfreeze.models import tiny_model

WORDS, LENGTH = 12, 20
WORD, PREVIOUS, PLACE = slice(0, 12), slice(12, 24), slice(24, 44)
"""Of the residual stream: the word, the word before it, and the place."""


def scores(model: Any, *args: Any, **options: Any) -> HeadMeasures:
    return pattern_scores(model, *args, **{"progress": False, "resamples": 100} | options)


def planted() -> Any:
    """A GPT-2 of two layers whose heads do what they are named for, and others that look everywhere alike.

    0.0 attends to the previous token and writes its word where later layers find it; 1.0 is an induction head that
    copies the word that it sees; 0.1 attends to the first token, and makes the word that it sees less likely; 1.1
    attends to the word's first time.
    """
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=WORDS, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
        model.transformer.wte.weight[:, WORD] = torch.eye(WORDS)
        model.transformer.wpe.weight[:, PLACE] = torch.eye(LENGTH)
        _plant(model, 0, 0, q=(PLACE, torch.eye(LENGTH).roll(-1, 1)), k=(PLACE, torch.eye(LENGTH)), moved=PREVIOUS)
        first = torch.zeros(LENGTH, LENGTH)
        first[:, 0] = 1.0
        _plant(model, 0, 1, q=(PLACE, first), k=(PLACE, torch.eye(LENGTH)), moved=WORD, sign=-0.01)
        _plant(model, 1, 0, q=(WORD, torch.eye(WORDS)), k=(PREVIOUS, torch.eye(WORDS)), moved=WORD)
        # Of the two times the one that has nothing in front of it in the second half: the first.
        early = torch.eye(WORDS)
        _plant(model, 1, 1, q=(WORD, early), k=(WORD, early), moved=None)
        late = torch.arange(LENGTH) >= LENGTH // 2
        weight = model.transformer.h[1].attn.c_attn.weight
        model.transformer.h[1].attn.c_attn.bias[32 + 20] = 1.0
        weight[PLACE.start : PLACE.stop, 64 + 32 + 20] = -40.0 * late.float()
    return model


def _plant(model: Any, layer: int, head: int, q: Any, k: Any, moved: slice | None, sign: float = 1.0) -> None:
    attention = model.transformer.h[layer].attn
    start = 32 * head
    for block, (where, matrix) in enumerate((q, k)):
        at = 64 * block + start
        attention.c_attn.weight[where, at : at + matrix.shape[1]] = 5.0 * matrix
    if moved is not None:
        attention.c_attn.weight[WORD, 128 + start : 128 + start + WORDS] = torch.eye(WORDS)
        attention.c_proj.weight[start : start + WORDS, moved] = sign * torch.eye(WORDS)


def test_planted_heads_are_found() -> None:
    model = planted()
    found = scores(model, LENGTH // 2, 6)
    expected = {
        "previous_token": (0, 0),
        "first_token": (0, 1),
        "prefix_matching": (1, 0),
        "duplicate_token": (1, 1),
    }
    for measure, head in expected.items():
        values = found.values[measure]
        assert found.top(measure, 1) == [head]
        # Less than 1: the very first word has no word before it, and is taken for its own.
        assert float(values[head]) > 0.94, measure
        values[head] = 0
        assert float(values.max()) < 0.3, measure
    copying = copying_scores(model).values["copying"]
    assert float(copying[1, 0]) > 0.99
    assert float(copying[0, 1]) < -0.99
    assert bool(copying[1, 1].isnan())  # it moves nothing


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral_gqa", "falcon_mqa"])
@pytest.mark.parametrize("first", [None, 3])
def test_scores_are_those_of_a_loop_by_hand(name: str, first: int | None) -> None:
    model: Any = tiny_model(name)
    given: list[Tensor] = []
    hook = model.register_forward_pre_hook(lambda _, __, kwargs: given.append(kwargs["input_ids"]), with_kwargs=True)
    found = scores(model, 5, 3, first=first, batch_size=2, seed=1)
    hook.remove()
    assert [len(one) for one in given] == [2, 2, 1, 1]  # under its own attention, and under eager
    by_hand: dict[str, Any] = {measure: np.zeros((3, 4, 3)) for measure in found.values}
    for row, ids in enumerate([*given[0], *given[2]]):
        words = ids.tolist()
        if first is not None:
            assert words[0] == first
        seen = AttentionCircuitFreezer().record(model, ids[None], pattern=True)
        begin = 0 if first is None else 1
        for layer in range(3):
            pattern = seen[layer].pattern[0].double()
            for head in range(4):
                prefix, duplicate, previous, sink = [], [], [], []
                for query in range(1, len(words)):
                    previous.append(float(pattern[head, query, query - 1]))
                    sink.append(float(pattern[head, query, 0]))
                    earlier = words.index(words[query], begin)
                    if earlier < query:
                        duplicate.append(float(pattern[head, query, earlier]))
                        prefix.append(float(pattern[head, query, earlier + 1]))
                assert len(duplicate) == 5
                for measure, values in zip(by_hand, (prefix, duplicate, previous, sink), strict=True):
                    by_hand[measure][layer, head, row] = np.mean(values)
    resampling = Resampling(0.95, 100, 0)
    for measure, values in by_hand.items():
        assert np.allclose(found.values[measure], values.mean(-1), atol=1e-6)
        one = torch.from_numpy(values[1, 2])
        _, low, high = resampling.estimate(mean, one, torch.ones_like(one))
        assert float(found.low[measure][1, 2]) == pytest.approx(low, abs=1e-6)
        assert float(found.high[measure][1, 2]) == pytest.approx(high, abs=1e-6)


def test_of_an_encoder_and_a_decoder_it_is_the_decoder() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    model = T5ForConditionalGeneration(config).eval()
    heard: list[torch.Tensor] = []
    hook = model.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: heard.append(kwargs["input_ids"]), with_kwargs=True
    )
    found = scores(model, 5, 3)
    hook.remove()
    ids = next(one for one in heard if len(one) == 3)
    assert ids.shape == (3, 10)
    seen = AttentionCircuitFreezer().record(model, {"input_ids": ids, "decoder_input_ids": ids}, pattern=True)
    for layer in range(2):
        pattern = seen[layer].pattern
        assert pattern is not None
        by_hand = pattern[:, :, 5:].diagonal(1, 2, 3).mean(-1).mean(0)  # the token after the first time
        assert found.values["prefix_matching"][layer].tolist() == pytest.approx(by_hand.tolist(), abs=1e-6)


def test_a_table_says_of_what_it_is() -> None:
    found = scores(tiny_model("llama_gqa"), 6, 4, layers=[-1])
    frame = found.to_frame()
    assert list(frame.columns) == ["measure", "layer", "head", "value", "low", "high", "n", "unit"]
    assert set(frame.unit) == {"share of attention"}
    assert len(frame) == 4 * 4
    assert set(frame.layer) == {2}
    assert set(frame.n) == {4}
    assert bool(
        (frame.low <= frame.value).all() and (frame.value <= frame.high).all() and (frame.low < frame.high).all()
    )
    lines = found.to_markdown(1).splitlines()
    layer, head = found.top("prefix_matching", 1)[0]
    value, low, high = (float(one["prefix_matching"][layer, head]) for one in (found.values, found.low, found.high))
    assert f"| {layer}.{head}    | {value:.3g} [{low:.3g}, {high:.3g}]" in lines[2]
    assert "value (share of attention)" in lines[0]
    assert lines[-1].startswith(
        "LlamaForCausalLM: mean attention of each head (layer.head) on 6 distinct random tokens"
    )
    assert "n = 4 sequences. In brackets 95 % expanded percentile" in lines[-1]
    latex = found.to_latex(2)
    assert latex.startswith("\\begin{table}")
    assert "95 \\% expanded percentile" in latex
    weights = copying_scores(tiny_model("llama_gqa"))
    assert weights.to_frame().low.isna().all()
    assert "[" not in weights.to_markdown().splitlines()[2]
    assert weights.to_markdown().splitlines()[-1].startswith("LlamaForCausalLM: sum of the eigenvalues of W_E W_V W_O")
    with pytest.raises(InterventionError, match="measure='copied': must be one of copying"):
        weights.top("copied")
    with pytest.raises(InterventionError, match="count=0"):
        weights.to_markdown(0)


def test_the_same_seed_gives_the_same_and_nothing_is_drawn_from_torch() -> None:
    model = tiny_model("gpt2")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, same, other = (scores(model, 6, 3, seed=seed).values["previous_token"] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_frozen_model_is_looked_at_as_it_is() -> None:
    model = tiny_model("gpt2")
    config = InterventionConfig([1], [2], "qk")
    with AttentionCircuitFreezer().freeze_circuits(model, config):
        found = scores(model, 6, 3)
    uniform = float((1 / torch.arange(2.0, 13.0)).mean())
    assert float(found.values["first_token"][1, 2]) == pytest.approx(uniform, abs=1e-6)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((1,), {}, "tokens=1: must be an int of at least 2"),
        ((97,), {}, "tokens=97: must be at most 96"),
        ((5, 1), {}, "n=1: must be an int of at least 2"),
        ((5, 2), {"layers": [3]}, "layer_indices"),
        ((5, 2), {"first": 97}, "first=97: must be None or one of 97 token ids"),
        ((5, 2), {"first": True}, "first=True"),
        ((5, 2), {"seed": -1}, "seed=-1"),
        ((5, 2), {"batch_size": 0}, "batch_size=0"),
        ((5, 2), {"confidence": 1}, "confidence=1"),
        ((5, 2), {"progress": None}, "progress=None"),
    ],
)
def test_bad_input_is_an_error_before_any_pass(args: Any, options: dict[str, Any], message: str) -> None:
    model: Any = tiny_model("gpt2")
    model.forward = None
    with pytest.raises(InterventionError, match=message):
        scores(model, *args, **options)


def test_without_scipy_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=r"pip install 'pytest-circuitfreeze\[studies\]'"):
        scores(None)


def test_induction_heads_of_a_trained_model() -> None:
    pytest.importorskip("gguf", reason="the extra 'smollm2' is not installed")
    try:
        smollm2_gguf()
    except ModelLoadError as error:
        pytest.skip(str(error))
    model = load_model(SMOLLM2)
    found = scores(model, 20, 2, layers=range(10, 20))
    top = found.top("prefix_matching", 5)
    assert top[0] == (18, 6)
    assert {(17, 3), (17, 4), (17, 5)} < set(top)
    assert float(found.low["prefix_matching"][18, 6]) > 0.6
    assert set(found.top("previous_token", 2)) == {(16, 0), (11, 1)}
