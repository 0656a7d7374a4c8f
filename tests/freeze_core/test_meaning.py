"""Reference, resample, the circuit's own gradient, cross-attention, caches and threads."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
import transformers
from cache_names import CACHE, cache_of
from encoder_decoders import bart

from freeze_core import AttentionCircuitFreezer, InterventionConfig, InterventionError, StaleCacheWarning
from freeze_core.attention.sites import find_sites
from pytest_circuitfreeze.models import draw_parameters, tiny_model

FREEZER = AttentionCircuitFreezer()


def logits(model, ids, config, **kwargs):
    with torch.no_grad(), FREEZER.freeze_circuits(model, config):
        return model(ids, **kwargs).logits


@pytest.mark.parametrize("scope", ["group", "head"])
@pytest.mark.parametrize("circuit", ["qk", "ov", "both"])
def test_a_reference_holds_the_recorded_activations(any_storage, ids, scope, circuit):
    other = (ids + 11) % 97
    source, clean = FREEZER.record(any_storage, other, pattern=True), FREEZER.record(any_storage, ids)
    config = InterventionConfig([0], [1], circuit, "reference", kv_scope=scope, reference=source)
    with FREEZER.freeze_circuits(any_storage, config):
        held = FREEZER.record(any_storage, ids, pattern=True)[0]
    group = 4 // source[0].k.shape[2]
    for role in "qkv":
        for head in range(getattr(held, role).shape[2]):
            shared = role != "q" and held.k.shape[2] < 4
            chosen = head == (1 // group if shared else 1) and role in {"qk": "qk", "ov": "v", "both": "qkv"}[circuit]
            recorded = (source if chosen else clean)[0]
            origin = head // (getattr(held, role).shape[2] // getattr(recorded, role).shape[2])
            assert torch.equal(getattr(held, role)[:, :, head], getattr(recorded, role)[:, :, origin]), (role, head)
    if "k" in circuit or circuit == "both":  # patterns held still, within a float32 softmax
        torch.testing.assert_close(held.pattern[:, 1], source[0].pattern[:, 1], atol=1e-6, rtol=0)


def test_a_reference_of_one_row_serves_every_batch(model, ids):
    source = FREEZER.record(model, ids[:1])
    config = InterventionConfig([1], [0], freeze_type="reference", reference=source)
    both = logits(model, ids, config)
    torch.testing.assert_close(both[:1], logits(model, ids[:1], config))


def test_a_reference_that_does_not_fit_is_refused(model, ids):
    def frozen(source, tokens, **kwargs):
        with pytest.raises(InterventionError) as error:
            logits(model, tokens, InterventionConfig([1], freeze_type="reference", reference=source), **kwargs)
        return str(error.value)

    assert "of its own length" in frozen(FREEZER.record(model, ids[:, :5]), ids)
    assert "of its own length" in frozen(FREEZER.record(model, ids.repeat(2, 1)), ids)
    padded = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    assert "another attention_mask" in frozen(FREEZER.record(model, ids), ids, attention_mask=padded)
    source = FREEZER.record(model, {"input_ids": ids, "attention_mask": padded})
    assert "another attention_mask" in frozen(source, ids)
    assert "another attention_mask" in frozen(source, ids, attention_mask=torch.ones_like(ids))
    assert "holds nothing of layer 1" in frozen(FREEZER.record(model, ids, layers=[0]), ids)
    logits(model, ids, InterventionConfig([1], freeze_type="reference", reference=source), attention_mask=padded)


def test_resample_takes_the_same_column_of_another_row(any_storage):
    ids = torch.randint(0, 97, (4, 6), generator=torch.Generator().manual_seed(1))
    clean = FREEZER.record(any_storage, ids)[0].v
    draws = set()
    for seed in range(8):
        with FREEZER.freeze_circuits(any_storage, InterventionConfig([0], None, "ov", "resample", seed=seed)):
            held = FREEZER.record(any_storage, ids)[0].v
        rows = [[other for other in range(4) if torch.equal(held[row], clean[other])] for row in range(4)]
        assert all(len(found) == 1 and found != [row] for row, found in enumerate(rows))
        assert sorted(found[0] for found in rows) == [0, 1, 2, 3]
        draws.add(str(rows))
    assert len(draws) > 1


def test_resample_without_another_row_or_with_padding_is_refused(model, ids):
    config = InterventionConfig(freeze_type="resample")
    with pytest.raises(InterventionError, match="this pass has 1 row"):
        logits(model, ids[:1], config)
    with pytest.raises(InterventionError, match="2 rows with padding"):
        logits(model, ids, config, attention_mask=torch.tensor([[1] * 7, [1] * 5 + [0] * 2]))


def test_resample_under_beam_search_is_refused_and_under_greedy_is_not(ids):
    model = tiny_model("llama_gqa")
    with FREEZER.freeze_circuits(model, InterventionConfig([0], [1], freeze_type="resample", kv_scope="head")):
        model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
        with pytest.raises(InterventionError, match="beam search"):
            model.generate(ids, max_new_tokens=3, num_beams=2, do_sample=False, pad_token_id=0)


OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")


@pytest.mark.parametrize("circuit", ["qk", "ov", "both"])
@pytest.mark.parametrize("scope", ["group", "head"])
def test_circuit_ste_is_frozen_forward_and_untouched_backward(any_storage, ids, circuit, scope):
    """The layer's projections get, from the frozen run's dz, the gradient of the attention without the freeze."""
    config = InterventionConfig([1], [1], circuit, "zero", "circuit_ste", kv_scope=scope)
    attention = find_sites(any_storage).by_layer[1].attention
    output = next(child for name, child in attention.named_children() if name in OUTPUTS)
    weights = [one for name, one in attention.named_parameters() if not name.startswith(OUTPUTS)]
    calls, zs = [], []

    def keep_z(module, args):
        zs.append(args[0])

    hooks = [
        attention.register_forward_pre_hook(lambda module, *call: calls.append(call), with_kwargs=True),
        output.register_forward_pre_hook(keep_z),
    ]
    with FREEZER.freeze_circuits(any_storage, config):
        frozen = any_storage(ids, use_cache=False).logits
        got = torch.autograd.grad(frozen.square().mean(), [zs[0], *weights])  # the spared z comes first
    zs.clear()
    args, kwargs = calls[0]
    attention(*args, **kwargs)
    expected = torch.autograd.grad(zs[0], weights, got[0])
    for hook in hooks:
        hook.remove()
    for mine, theirs in zip(got[1:], expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)  # unshared heads round otherwise
        assert mine.abs().max() > 0
    plain = InterventionConfig([1], [1], circuit, "zero", kv_scope=scope)
    assert torch.equal(frozen, logits(any_storage, ids, plain, use_cache=False))


def test_circuit_ste_leaves_dropout_and_generators_as_they_are(ids):
    model = tiny_model("gpt2").train()
    model.transformer.h[1].attn.attn_dropout.p = model.config.attn_pdrop = 0.5
    torch.manual_seed(0)
    model(ids, use_cache=False)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    with FREEZER.freeze_circuits(model, InterventionConfig([1], [0], backward_mode="circuit_ste")):
        model(ids, use_cache=False)
    assert torch.equal(state, torch.get_rng_state())


def t5():
    config = transformers.T5Config(
        vocab_size=97,
        d_model=32,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    draw_parameters(model, 0)
    return model


@pytest.mark.parametrize("build", [bart, t5])
@pytest.mark.parametrize("attention", ["self", "cross", "encoder"])
@pytest.mark.parametrize(
    "kwargs", [{"freeze_type": "zero"}, {"freeze_type": "mean"}, {"freeze_type": "noise", "noise_std": 1}]
)
def test_each_attention_of_an_encoder_and_decoder_is_frozen_alone(build, attention, kwargs, ids):
    model = build()
    given = {
        "input_ids": ids,
        "decoder_input_ids": ids[:, :4],
        "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2]),
    }
    with torch.no_grad():
        clean = model(**given).logits
        with FREEZER.freeze_circuits(model, InterventionConfig([1], [2], attention=attention, **kwargs)):
            part = {"self": "decoder", "cross": "decoder", "encoder": "encoder"}[attention]
            replaced = [name for name, module in model.named_modules() if "forward" in vars(module)]
            # Around the encoder: what takes its outputs, which may be older than the freeze.
            around = [name for name in replaced if part not in name]
            assert around == (["model" if build is bart else ""] if attention == "encoder" else [])
            assert (attention == "cross") == any("ncoder_attn" in name or "EncDec" in name for name in replaced)
            frozen = model(**given, use_cache=False).logits
        assert not torch.equal(frozen, clean)
        assert torch.equal(model(**given).logits, clean)


@pytest.mark.parametrize("build", [bart, t5])
def test_cross_attention_is_in_force_while_generating_from_its_cache(build, ids):
    model = build()
    with FREEZER.freeze_circuits(model, InterventionConfig([0, 1], [1], attention="cross")), torch.no_grad():
        out = model.generate(
            ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True, eos_token_id=None
        )
        whole = model(input_ids=ids, decoder_input_ids=out.sequences[:, :-1], use_cache=False).logits
    steps = torch.stack(out.logits, dim=1)
    torch.testing.assert_close(steps, whole[:, -steps.shape[1] :], rtol=0, atol=1e-4 * float(whole.abs().max()))


def step(model, ids, cache):
    with torch.no_grad():
        return model(ids[:, 6:7], **{CACHE: cache}).logits


def prefill(model, ids):
    with torch.no_grad():
        return cache_of(model(ids[:, :6], use_cache=True))


def test_a_cache_from_before_the_freeze_is_recognised(model, ids):
    config = InterventionConfig([0], [1], "ov")
    cache = prefill(model, ids)
    with FREEZER.freeze_circuits(model, config), pytest.warns(StaleCacheWarning, match="filled without the freeze"):
        step(model, ids, copy.deepcopy(cache))
    strict = AttentionCircuitFreezer(on_stale_cache="error").freeze_circuits(model, config)
    with strict, pytest.raises(InterventionError, match="filled without the freeze"):
        step(model, ids, copy.deepcopy(cache))
    with AttentionCircuitFreezer(on_stale_cache="ignore").freeze_circuits(model, config):
        step(model, ids, cache)


def test_a_cache_of_another_freeze_is_recognised_and_one_of_the_same_is_not(model, ids):
    with FREEZER.freeze_circuits(model, InterventionConfig([0], [1], "ov")):
        cache = prefill(model, ids)
    with FREEZER.freeze_circuits(model, InterventionConfig([0], [1], "ov")), warnings.catch_warnings():
        warnings.simplefilter("error")
        again = copy.deepcopy(cache)
        step(model, ids, again)
        step(model, ids, again)
    for other in (
        InterventionConfig([0], [2], "qk"),
        InterventionConfig([1], [1], "ov"),
        InterventionConfig([0], [1], "v", strength=0.5),
    ):
        mixed = copy.deepcopy(cache)
        with FREEZER.freeze_circuits(model, other), pytest.warns(StaleCacheWarning):
            step(model, ids, mixed)
        with FREEZER.freeze_circuits(model, other), pytest.warns(StaleCacheWarning):  # it stays foreign
            step(model, ids, mixed)


@pytest.mark.parametrize("name", ["mistral_gqa", "falcon_mqa"])
def test_a_cache_does_not_cross_the_unsharing_of_heads(name, ids):
    model = tiny_model(name)
    config = InterventionConfig([0], [1], "ov", kv_scope="head")
    with FREEZER.freeze_circuits(model, config):
        inside = prefill(model, ids)
    outside = prefill(model, ids)
    with FREEZER.freeze_circuits(model, config), pytest.raises(InterventionError, match="other KV heads"):
        step(model, ids, outside)
    with (
        FREEZER.freeze_circuits(model, InterventionConfig([0], [1], "q")),
        pytest.raises(InterventionError, match="other KV"),
    ):
        step(model, ids, inside)


def test_a_second_thread_is_refused(ids):
    model = tiny_model("gpt2")
    inside, done, errors = threading.Event(), threading.Event(), []

    def wait(module, args):
        inside.set()
        done.wait(10)

    hook = model.transformer.h[0].register_forward_pre_hook(wait)
    with FREEZER.freeze_circuits(model, InterventionConfig([1])):
        other = threading.Thread(target=lambda: model(ids))
        other.start()
        inside.wait(10)
        with pytest.raises(InterventionError, match="running already, in another thread"):
            model(ids)
        hook.remove()
        done.set()
        other.join()
        model(ids)
    assert not errors


GIVEN_PADDING = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])


def seq2seq(ids, decoder_length=4):
    return {
        "input_ids": ids,
        "decoder_input_ids": ids[:, :decoder_length],
        "attention_mask": GIVEN_PADDING,
        "use_cache": False,
    }


@pytest.mark.parametrize("build", [bart, t5])
@pytest.mark.parametrize("attention", ["self", "cross", "encoder"])
@pytest.mark.parametrize("circuit", ["qk", "ov"])
def test_each_attention_is_held_at_its_own_recorded_activations(build, attention, circuit, ids):
    model = build()
    source = FREEZER.record(model, seq2seq((ids + 11) % 97), attention=attention)
    clean = FREEZER.record(model, seq2seq(ids), attention=attention)[1]
    config = InterventionConfig([1], [2], circuit, "reference", reference=source, attention=attention)
    with FREEZER.freeze_circuits(model, config):
        held = FREEZER.record(model, seq2seq(ids), attention=attention)[1]
    for role in "qkv":
        from_source = role in {"qk": "qk", "ov": "v"}[circuit]
        assert torch.equal(getattr(held, role)[:, :, 2], getattr(source[1] if from_source else clean, role)[:, :, 2])
        assert torch.equal(getattr(held, role)[:, :, 1], getattr(clean, role)[:, :, 1])


@pytest.mark.parametrize("attention", ["self", "cross", "encoder"])
def test_each_attention_is_held_at_its_own_calibrated_means(attention, ids, tmp_path):
    model = bart()
    batches = [seq2seq(ids), seq2seq((ids + 3) % 97, 6)]
    statistics = FREEZER.calibrate(model, batches, progress=False, attention=attention)
    real = [
        GIVEN_PADDING.bool() if attention != "self" else torch.ones_like(b["decoder_input_ids"]).bool() for b in batches
    ]
    values = [FREEZER.record(model, batch, attention=attention)[0].v for batch in batches]
    expected = torch.cat([v[at] for v, at in zip(values, real, strict=True)]).double().mean(0)
    torch.testing.assert_close(statistics[0].mean["v"], expected, rtol=0, atol=1e-12)
    statistics.save(tmp_path / "statistics")
    loaded = type(statistics).load(tmp_path / "statistics")
    config = InterventionConfig([0], [1], "v", "mean", statistics=loaded, attention=attention)
    with FREEZER.freeze_circuits(model, config):
        held = FREEZER.record(model, batches[0], attention=attention)[0].v[:, :, 1]
    assert torch.equal(held, expected[1].float().expand_as(held))


def test_activations_of_another_attention_are_refused(ids):
    model = bart()
    source = FREEZER.record(model, seq2seq(ids), attention="cross")
    with pytest.raises(InterventionError, match=r"reference=.*recorded with attention='self'"):
        InterventionConfig([0], freeze_type="reference", reference=source)
    statistics = FREEZER.calibrate(model, [seq2seq(ids)], progress=False)
    config = InterventionConfig([0], freeze_type="mean", statistics=statistics, attention="encoder")
    with pytest.raises(InterventionError, match="of self attention, and attention='encoder' is to be frozen"):
        FREEZER.freeze_circuits(model, config)
    padded = {**seq2seq(ids), "attention_mask": torch.ones_like(ids)}
    config = InterventionConfig([0], freeze_type="reference", reference=source, attention="cross")
    with FREEZER.freeze_circuits(model, config), torch.no_grad():
        model(**seq2seq(ids))
        with pytest.raises(InterventionError, match="another attention_mask"):
            model(**padded)


@pytest.mark.parametrize("kwargs", [{}, {"noise_std": 1.0}], ids=["of the pass", "stated"])
@pytest.mark.parametrize("name", ["llama_gqa", "phi3", "falcon_mqa"])
def test_query_heads_of_one_kv_head_share_its_draw(name, kwargs, ids):
    model = tiny_model(name)
    with FREEZER.freeze_circuits(model, InterventionConfig([1], None, "both", "noise", **kwargs)):
        shared = FREEZER.record(model, ids)[1]
    chosen = [0, 1, 3]  # not all of them, so that under head each has its own view
    with FREEZER.freeze_circuits(model, InterventionConfig([1], chosen, "both", "noise", kv_scope="head", **kwargs)):
        own = FREEZER.record(model, ids)[1]
    for role in "kv":
        one, each = getattr(shared, role), getattr(own, role)
        of_each = one.repeat_interleave(4 // one.shape[2], dim=2)
        torch.testing.assert_close(each[:, :, chosen], of_each[:, :, chosen], rtol=1e-5, atol=1e-6)  # sums of a mean


@pytest.mark.parametrize("role", "qkv")
def test_recorded_activations_of_latent_attention_are_held(role, ids):
    model = tiny_model("deepseek_v3")
    recording = FREEZER.record(model, ids.flip(1))
    config = InterventionConfig([1], None, role, "reference", reference=recording)
    with FREEZER.freeze_circuits(model, config):
        assert torch.equal(getattr(FREEZER.record(model, ids)[1], role), getattr(recording[1], role))
