"""Attribution is the derivative of the exact scores, for every circuit, scope and freeze type, from a few passes."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from one_by_one import FREEZER
from running_twice import run_layers_twice
from torch import nn

from freeze_core import InterventionConfig, InterventionError, UnsupportedModelError, score_heads
from pytest_circuitfreeze.models import tiny_model

CIRCUITS = ("qk", "ov", "both", "q", "k", "v", "z")
IDS = torch.arange(14).view(2, 7) * 5 % 97
SMALL = 0.003
"""A strength. Some norms compute in float32 whatever the model is in, so that none can be much smaller."""


def spread(logits):
    """A metric that every position and some words count in."""
    return logits[..., 5].sum(1) - logits[..., 7].sum(1)


def fields_of(kind, model, inputs=IDS):
    other = {"input_ids": inputs.flip(1), "attention_mask": torch.ones_like(inputs)}
    return {
        "zero": dict,
        "mean": lambda: {"freeze_type": "mean"},
        "noise": lambda: {"freeze_type": "noise", "seed": 3},
        "noise_std": lambda: {"freeze_type": "noise", "noise_std": 1.0},
        "resample": lambda: {"freeze_type": "resample", "seed": 4},
        "reference": lambda: {"freeze_type": "reference", "reference": FREEZER.record(model, other)},
        "statistics": lambda: {
            "freeze_type": "mean",
            "statistics": FREEZER.calibrate(model, [other], progress=False),
        },
    }[kind]()


def is_the_derivative(model, inputs=IDS, circuits=CIRCUITS, metric=spread, bound=5e-3, **fields):
    """Estimates and exact scores have the same derivative by the strength, at 0, to `bound` of the largest."""
    fields = {**fields, "circuits": circuits, "progress": False}
    slopes = {}
    for method in ("exact", "attribution"):
        one, two = (score_heads(model, inputs, metric, method, strength=n * SMALL, **fields) for n in (1, 2))
        assert (one.method, one.rows) == (method, two.rows)
        slopes[method] = {circuit: (4 * one.scores[circuit] - two.scores[circuit]) / 2 / SMALL for circuit in circuits}
    for circuit in circuits:
        found, expected = slopes["attribution"][circuit], slopes["exact"][circuit]
        scale = float(expected.nan_to_num().abs().max())
        assert scale > 1e-3
        torch.testing.assert_close(found, expected, rtol=0, atol=bound * scale, equal_nan=True)


@pytest.mark.parametrize("kind", ["zero", "reference"])
@pytest.mark.parametrize("scope", ["group", "head"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral_gqa", "falcon_mqa"])
def test_estimates_are_the_derivative_of_exact_scores(name, scope, kind):
    model = tiny_model(name).double()
    is_the_derivative(model, kv_scope=scope, **fields_of(kind, model))


@pytest.mark.parametrize("kind", ["mean", "noise", "noise_std", "resample", "statistics"])
@pytest.mark.parametrize("scope", ["group", "head"])
def test_estimates_of_every_freeze_type_are(scope, kind):
    model = tiny_model("mistral_gqa").double()
    is_the_derivative(model, kv_scope=scope, **fields_of(kind, model))


@pytest.mark.parametrize("name", ["falcon_alibi", "gemma2", "bart", "opt", "mixtral", "bitnet", "gpt_oss", "jamba"])
def test_estimates_of_odd_models_are_too(name):
    is_the_derivative(tiny_model(name).double(), circuits=("qk", "ov", "z"), kv_scope="head")


@pytest.mark.parametrize("name", ["qwen3", "qwen3_next", "gemma4_text"])
def test_estimates_behind_norms_of_each_head_are_too(name):
    model = tiny_model(name).double()  # which a freeze at 0 of some strength does not reach: they make up for it
    is_the_derivative(model, circuits=("qk", "ov", "z"), freeze_type="noise", noise_std=1.0)


def test_estimates_of_latent_attention_are_too():
    is_the_derivative(tiny_model("deepseek_v3").double(), circuits=("q", "ov", "z"))


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_estimates_over_any_batches_are_the_derivative(data):
    model = tiny_model(data.draw(st.sampled_from(["gpt2", "llama_gqa", "falcon_mqa"]))).double()
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 3), st.integers(3, 8)), min_size=1, max_size=3))
    batches = []
    for rows, columns in shapes:
        ids = torch.randint(0, 97, (rows, columns), generator=torch.Generator().manual_seed(columns))
        mask = torch.ones_like(ids)
        mask[0, : data.draw(st.integers(0, columns - 3))] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    is_the_derivative(
        model,
        batches,
        metric=data.draw(st.sampled_from(["loss", spread])),
        circuits=("qk", "ov"),
        kv_scope=data.draw(st.sampled_from(["group", "head"])),
        freeze_type=data.draw(st.sampled_from(["zero", "mean", "noise"])),
    )


def test_estimates_of_cross_attention_and_of_encoders_are_the_derivative():
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 97}
    heads = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = BartForConditionalGeneration(BartConfig(**sizes, **heads, init_std=0.3)).eval().double()
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS.flip(1)}
    for attention in ("self", "cross", "encoder"):
        is_the_derivative(model, inputs, ("qk", "ov"), attention=attention)


def test_estimates_of_layers_that_run_twice_are_the_derivative():
    model = tiny_model("gpt2").double()
    run_layers_twice(model)
    is_the_derivative(model, circuits=("qk", "ov", "z"))


def test_estimates_at_full_strength_recompute_the_softmax():
    """In a model that is linear after z, the last layer of one without MLP and norm, they are the exact scores."""
    model = tiny_model("gpt2").double()
    model.transformer.h[2].mlp.forward = torch.zeros_like
    model.transformer.ln_f.forward = lambda x: x
    for kind in ("zero", "mean", "noise"):
        fields = {"layers": [2], "circuits": CIRCUITS, "progress": False, **fields_of(kind, model)}
        expected = score_heads(model, IDS, spread, **fields).scores
        found = score_heads(model, IDS, spread, "attribution", **fields).scores
        for circuit in CIRCUITS:
            torch.testing.assert_close(found[circuit], expected[circuit], rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("metric", ["kl", "loss"])
@pytest.mark.parametrize("name", ["gpt2", "mistral_gqa"])
def test_integrated_gradients_of_the_heads_of_a_layer_sum_to_what_freezing_them_all_does(name, metric):
    model = tiny_model(name).double()
    with torch.no_grad():
        clean = model(IDS).logits
    for circuit in ("qk", "v"):
        fields = {"circuits": [circuit], "freeze_type": "mean", "progress": False}
        exact = score_heads(model, IDS, metric, **fields).scores[circuit]
        found = score_heads(model, IDS, metric, "attribution", ig_steps=64, **fields).scores[circuit]
        assert float((found - exact).abs().max()) > 1e-3 * float(exact.abs().max())  # heads of a layer interact
        for layer in range(3):
            with FREEZER.freeze_circuits(model, InterventionConfig([layer], None, circuit, "mean")), torch.no_grad():
                frozen = model(IDS).logits
            change = of_logits(metric, frozen, clean) - of_logits(metric, clean, clean)
            assert float(found[layer].sum()) == pytest.approx(change, rel=1e-3)


def of_logits(metric, logits, clean):
    if metric == "loss":
        return float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()))
    before = clean.log_softmax(-1)
    return float((before.exp() * (before - logits.log_softmax(-1))).sum(-1).mean())


def test_integrated_gradients_of_the_only_head_of_a_layer_come_to_its_exact_score():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = (
        GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=16, n_layer=3, n_head=1, initializer_range=0.3))
        .eval()
        .double()
    )
    fields = {"circuits": CIRCUITS, "progress": False}
    exact = score_heads(model, IDS, "kl", **fields).scores
    errors = []
    for steps in (1, 4, 16, 64):
        found = score_heads(model, IDS, "kl", "attribution", ig_steps=steps, **fields).scores
        errors.append(max(float((found[one] - exact[one]).abs().max()) for one in CIRCUITS))
    assert errors[0] > 4 * errors[1] > 16 * errors[2]
    assert errors[3] < 1e-4 * max(float(scores.abs().max()) for scores in exact.values())


@contextmanager
def passes(model):
    """How often the model runs."""
    seen = []
    handle = model.register_forward_hook(lambda *args: seen.append(torch.is_grad_enabled()))
    try:
        yield seen
    finally:
        handle.remove()


def test_a_circuit_takes_one_pass_for_all_heads_of_all_layers():
    model = tiny_model("mistral_gqa")
    for scope, circuits, frozen in (
        ("head", ("qk",), 1),
        ("head", ("qk", "ov"), 2),
        ("head", ("ov", "v"), 1),
        ("group", ("qk", "ov"), 3),  # neighbours that share a KV head have k frozen and not q
    ):
        with passes(model) as seen:
            score_heads(model, IDS, spread, "attribution", circuits, kv_scope=scope, progress=False)
        assert seen == [True, *[False] * frozen, False]  # the last finds out that heads are apart
    with passes(model) as seen:
        score_heads(model, IDS, spread, "attribution", ("qk",), layers=[0, 1], ig_steps=5, progress=False)
    assert seen == [False] * 3 + [True] * 10


def test_where_heads_mix_before_z_each_is_frozen_by_itself():
    model = tiny_model("gpt2").double()
    for layer in model.transformer.h:
        layer.attn.c_proj.register_forward_pre_hook(lambda module, args: (args[0] + 0.3 * args[0].roll(8, -1).tanh(),))
    with passes(model) as seen:
        score_heads(model, IDS, spread, "attribution", ("ov",), progress=False)
    assert len(seen) == 3 + 4
    is_the_derivative(model)


def test_equal_interventions_have_equal_estimates():
    model = tiny_model("falcon_mqa")
    found = score_heads(model, IDS, spread, "attribution", ("ov", "v"), kv_scope="group", progress=False).scores
    assert torch.equal(found["ov"], found["v"])
    assert bool((found["ov"] == found["ov"][:, :1]).all())
    assert float(found["ov"].abs().min()) > 0


def test_strength_0_is_estimated_to_change_nothing():
    found = score_heads(tiny_model("gpt2"), IDS, spread, "attribution", strength=0.0, progress=False)
    assert all(bool((scores == 0).all()) for scores in found.scores.values())


def test_passes_in_training_draw_the_dropout_that_the_clean_pass_drew():
    model = tiny_model("gpt2").double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    batches = [IDS, IDS.flip(0)]
    torch.manual_seed(11)
    before = torch.get_rng_state()
    is_the_derivative(model, batches, circuits=("qk", "ov"))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


@pytest.mark.parametrize("when", ["inference", "no_grad", "without parameters' gradients", "padded"])
def test_estimates_are_had_whatever_the_model_runs_under(when):
    model = tiny_model("llama_gqa")
    inputs = IDS
    expected = score_heads(model, IDS, spread, "attribution", progress=False).scores
    model.requires_grad_(when != "without parameters' gradients")
    with torch.inference_mode(when == "inference"), torch.set_grad_enabled(when != "no_grad"):
        if when == "inference":
            inputs = IDS.clone()
        found = score_heads(model, inputs, spread, "attribution", progress=False).scores
    for circuit in expected:
        torch.testing.assert_close(found[circuit], expected[circuit], rtol=1e-5, atol=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_estimates_of_a_compiled_layer_are_those_of_its_own_code():
    model = tiny_model("llama_gqa")
    expected = score_heads(model, IDS, spread, "attribution", progress=False).scores
    model.model.layers[1].compile(backend="eager")
    found = score_heads(model, IDS, spread, "attribution", progress=False).scores
    for circuit in expected:
        torch.testing.assert_close(found[circuit], expected[circuit], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("metric", "fields", "message"),
    [
        ("kl", {}, "metric='kl' is least in the clean pass"),
        (spread, {"ig_steps": -1}, "ig_steps=-1: must be an int"),
        (spread, {"ig_steps": True}, "ig_steps=True: must be an int"),
        (spread, {"ig_steps": 2, "method": "exact"}, "ig_steps=2: must be 0 with method='exact'"),
        (lambda logits: logits[:, -1].argmax(-1).double(), {}, "carry no gradient"),
        (lambda logits: spread(logits).detach(), {}, "carry no gradient"),
        (lambda logits: (logits[:, -1, 0] - logits[:, -1, 0]).abs().sqrt(), {}, "gradient of the metric is not finite"),
    ],
)
def test_a_metric_without_a_gradient_is_refused(metric, fields, message):
    with pytest.raises(InterventionError, match=message):
        score_heads(tiny_model("gpt2"), IDS, metric, **{"method": "attribution", "progress": False, **fields})


def test_a_layer_that_no_gradient_reaches_is_refused_by_name():
    model = tiny_model("hrm_text")  # whose first cycles run without gradients
    with pytest.raises(InterventionError, match="gradient of the metric does not reach layer 0"):
        score_heads(model, IDS, spread, "attribution", progress=False)


def test_what_reaches_the_logits_behind_the_attentions_back_is_refused():
    model = tiny_model("gpt2")
    kept = {}
    first, last = model.transformer.h[0], model.transformer.h[2]
    first.attn.c_attn.register_forward_hook(lambda module, args, output: kept.update(values=output[..., -16:]))
    last.register_forward_pre_hook(lambda module, args: (args[0] + kept["values"].repeat(1, 1, 2), *args[1:]))
    width = model.config.n_embd
    assert width == 32
    with pytest.raises(UnsupportedModelError, match="reaches the logits by other ways"):
        score_heads(model, IDS, spread, "attribution", progress=False)


@pytest.mark.parametrize("when", [1, 2])
def test_the_model_is_what_it_was_whatever_is_raised(when):
    model = tiny_model("gpt2")
    before = model(IDS).logits
    calls = []

    def failing(logits):
        calls.append(1)
        if len(calls) == when:
            raise KeyboardInterrupt
        return spread(logits)

    with pytest.raises(KeyboardInterrupt):
        score_heads(model, IDS, failing, "attribution", ig_steps=1, progress=False)
    assert torch.equal(model(IDS).logits, before)
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
