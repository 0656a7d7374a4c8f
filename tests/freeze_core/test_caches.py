"""Every kind of cache: a freeze computes with it what it computes without one, and its mark stays right."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from contextlib import ExitStack

import pytest
import torch
import transformers
from cache_names import CACHE, cache_of
from recomputed import (
    CACHES,
    FREEZER,
    IDS,
    KINDS,
    LEFT,
    PIECES,
    agrees,
    arguments,
    config_of,
    decode,
    handed_over,
    quantised,
    recomputed,
)
from transformers import DynamicCache, EncoderDecoderCache, QuantizedCache, StaticCache

from freeze_core import AttentionCircuitFreezer, InterventionConfig, InterventionError, StaleCacheWarning
from freeze_core.freezing.caches import check_emptied_cache, mark_cache
from freeze_core.freezing.row_order import RowOrder, refuse_reordering
from pytest_circuitfreeze.models import draw_parameters, tiny_model
from pytest_circuitfreeze.shrinking import tiny_of_type

pytestmark = pytest.mark.filterwarnings("error::freeze_core.StaleCacheWarning")


@pytest.mark.parametrize("scope", ["group", "head"])
@pytest.mark.parametrize("kind", [*KINDS, "resample"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral_gqa", "falcon_mqa", "gemma2"])
def test_a_freeze_is_the_same_with_each_kind_of_cache(name, cache, kind, scope):
    """Windows are shorter than the prompt; Gemma 2 has layers with one and layers without."""
    model = tiny_model(name)
    mask = torch.ones_like(IDS) if kind == "resample" else LEFT
    config = config_of(kind, model, kv_scope=scope)
    want = recomputed(model, config, arguments(IDS, mask), mask)
    real = mask.bool()
    unfrozen = decode(model, IDS, mask, CACHES[cache](model))
    with FREEZER.freeze_circuits(model, config):
        got = decode(model, IDS, mask, CACHES[cache](model))
    agrees(got[real], want.logits[real], want.bound)
    assert (got - unfrozen)[real].abs().max() > 2 * want.bound


@pytest.mark.parametrize("scope", ["group", "head"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "llama_gqa", "falcon_mqa"])  # no windows: transformers refuses
def test_a_quantised_cache_is_handed_what_any_other_is(name, kind, scope):
    """Where everything is frozen, keys and values do not depend on what a coarse cache made of those before."""
    pytest.importorskip("optimum.quanto", reason="the extra 'conditions' is not installed")
    model = tiny_model(name)
    config = config_of(kind, model, layer_indices=None, head_indices=None, kv_scope=scope)
    coarse, exact = (handed_over(model, cache, config, IDS, LEFT) for cache in (quantised(model), DynamicCache()))
    assert torch.equal(coarse, exact)


def test_a_quantised_cache_under_a_freeze_is_that_of_a_model_without_the_head():
    """Bit for bit: however coarse the cache is, a head at zero is a head whose weights are zero."""
    pytest.importorskip("optimum.quanto", reason="the extra 'conditions' is not installed")
    model, without = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        for layer in (without.model.layers[0], without.model.layers[2]):
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                projection.weight[8:16] = 0
                projection.bias[8:16] = 0
    with FREEZER.freeze_circuits(model, config_of("zero", model)):
        got = decode(model, IDS, LEFT, quantised(model))
    want = decode(without, IDS, LEFT, quantised(without))
    assert torch.equal(got[LEFT.bool()], want[LEFT.bool()])
    assert not torch.equal(want, decode(without, IDS, LEFT, DynamicCache()))


def test_an_8_bit_float_cache_is_recognised_and_counted():
    model = tiny_model("llama")
    config = config_of("noise_std", model, layer_indices=None, head_indices=None)
    cache = QuantizedCache("fp8", model.config)
    coarse, exact = (handed_over(model, each, config, IDS, LEFT) for each in (cache, DynamicCache()))
    assert torch.equal(coarse, exact)


def small(kind):
    sizes = {"vocab_size": 97, "d_model": 32, "dropout": 0.0, "dropout_rate": 0.0, "d_ff": 32, "d_kv": 8}
    layers = {
        f"{part}_{what}": size for part in ("encoder", "decoder") for what, size in (("layers", 2), ("ffn_dim", 32))
    }
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_heads": 4}
    sounds = {"num_mel_bins": 8, "max_source_positions": 7, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    config_class = getattr(transformers, f"{kind}Config")
    config = config_class(**sizes, **layers, **heads, **(sounds if kind == "Whisper" else {"num_layers": 2}))
    config.decoder_start_token_id = 0
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    draw_parameters(model, 0)
    return model


ENCODER_MASK = torch.tensor([[1] * 5 + [0] * 2, [1] * 7])


def sources(kind):
    if kind == "Whisper":
        return {"input_features": torch.randn(2, 8, 14, generator=torch.Generator().manual_seed(0))}
    return {"input_ids": IDS[:, :7], "attention_mask": ENCODER_MASK}


ENCODER_DECODER = {
    "dynamic": lambda config: EncoderDecoderCache(DynamicCache(), DynamicCache()),
    "static": lambda config: EncoderDecoderCache(
        StaticCache(config=config, max_cache_len=16), StaticCache(config=config, max_cache_len=7)
    ),
}


@pytest.mark.parametrize("cache", ENCODER_DECODER)
@pytest.mark.parametrize(
    ("attention", "kind"),
    [("self", kind) for kind in KINDS] + [(part, kind) for part in ("cross", "encoder") for kind in KINDS[:2]],
)
@pytest.mark.parametrize("family", ["Bart", "T5", "Whisper"])
def test_a_freeze_is_the_same_with_a_cache_for_each_attention(family, attention, kind, cache):
    model = small(family)
    given = {**sources(family), "decoder_input_ids": IDS}
    config = config_of(kind, model, given, attention=attention)
    want = recomputed(model, config, given)
    filling, found = ENCODER_DECODER[cache](model.config), []
    with torch.no_grad(), FREEZER.freeze_circuits(model, config):
        encoded = model.get_encoder()(**sources(family))
        for start, stop in PIECES:
            piece = {"decoder_input_ids": IDS[:, start:stop], "attention_mask": sources(family).get("attention_mask")}
            found.append(model(encoder_outputs=encoded, **piece, **{CACHE: filling}, use_cache=True).logits)
    agrees(torch.cat(found, dim=1), want.logits, want.bound)


HEAD = InterventionConfig([0], [1], "ov", kv_scope="head")


@pytest.mark.parametrize("name", ["mistral_gqa", "falcon_mqa"])
@pytest.mark.parametrize("inside", [True, False])
def test_an_emptied_static_cache_does_not_cross_the_unsharing_of_heads(name, inside):
    model = tiny_model(name)
    first, second = (HEAD, InterventionConfig([0], [1], "ov")) if inside else (InterventionConfig([0], [1], "ov"), HEAD)
    cache = CACHES["static"](model)
    with FREEZER.freeze_circuits(model, first):
        decode(model, IDS, LEFT, cache)
    cache.reset()
    with FREEZER.freeze_circuits(model, second), pytest.raises(InterventionError, match="even an emptied one"):
        decode(model, IDS, LEFT, cache)
    plain = CACHES["static"](model)
    decode(model, IDS, LEFT, plain)
    plain.reset()
    with FREEZER.freeze_circuits(model, HEAD), pytest.raises(InterventionError, match="even an emptied one"):
        decode(model, IDS, LEFT, plain)


@pytest.mark.parametrize("cache", CACHES)
def test_an_emptied_cache_serves_again(model, cache):
    """Under the same freeze, under another one that stores as many heads, and, if it keeps no tensors, under any."""
    filled = CACHES[cache](model)
    others = [InterventionConfig([0], [1], "qk"), *([HEAD] if cache != "static" else [])]
    for config in (HEAD, HEAD) if cache == "static" else (HEAD, HEAD, *others):
        with FREEZER.freeze_circuits(model, config):
            first = decode(model, IDS, LEFT, filled)
            assert torch.equal(first[LEFT.bool()], decode(model, IDS, LEFT, CACHES[cache](model))[LEFT.bool()])
        filled.reset()


CHANGES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "crop": lambda cache: cache.crop(-2),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "repeat": lambda cache: cache.batch_repeat_interleave(1),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_mark_stays_right_when_its_cache_is_changed(model, change):
    """It is known to its own freeze, foreign to another one, and foreign once it has grown without a freeze."""
    config = InterventionConfig([0], [1], "ov")
    with FREEZER.freeze_circuits(model, config):
        cache = DynamicCache()
        decode(model, IDS, None, cache, ((0, 8),))
        changed = CHANGES[change](cache) or cache
        length = changed.get_seq_length()
        for _ in range(2):  # a second step goes on from what the first has marked
            decode(model, IDS, None, changed, ((length, length + 1),))
            length += 1
    foreign = copy.deepcopy(changed)
    other = FREEZER.freeze_circuits(model, InterventionConfig([0], [1], "qk"))
    with other, pytest.warns(StaleCacheWarning):
        decode(model, IDS, None, foreign, ((length, length + 1),))
    changed = CHANGES[change](changed) or changed
    length = changed.get_seq_length()
    decode(model, IDS, None, changed, ((length, length + 1),))
    with FREEZER.freeze_circuits(model, config), pytest.warns(StaleCacheWarning):
        decode(model, IDS, None, changed, ((length + 1, length + 2),))


@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_that_was_emptied_and_filled_unfrozen_is_recognised(model, cache):
    config = InterventionConfig([0], [1], "ov")
    filled = CACHES[cache](model)
    with FREEZER.freeze_circuits(model, config):
        decode(model, IDS, LEFT, filled, ((0, 8),))
    filled.reset()
    decode(model, IDS, LEFT, filled, ((0, 6),))
    with FREEZER.freeze_circuits(model, config), pytest.warns(StaleCacheWarning):
        decode(model, IDS, LEFT, filled, ((6, 7),))


def test_a_new_cache_whose_later_layers_read_earlier_keys_is_no_emptied_one():
    check_emptied_cache(DynamicCache(config=tiny_model("gemma3n_text").config), "0|frozen")


@pytest.mark.parametrize("freeze_type", ["zero", "resample"])  # the second also watches how rows are reordered
def test_a_marked_cache_of_an_encoder_decoder_shrinks_and_reorders_as_its_class_does(freeze_type):
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    mark_cache(cache, "|frozen", 0, 4)
    if freeze_type == "resample":
        refuse_reordering(cache, RowOrder())
    for part in (cache.self_attention_cache, cache.cross_attention_cache):
        part.update(*torch.arange(16.0).view(2, 2, 1, 4, 1), 0)
    cache.crop(-1)
    assert cache.get_seq_length() == 3
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.self_attention_cache.layers[0].keys[0].flatten().tolist() == [4.0, 5.0, 6.0]


def test_what_is_left_of_an_unfrozen_growth_after_a_crop_is_recognised(model):
    config = InterventionConfig([0], [1], "ov")
    cache = DynamicCache()
    with FREEZER.freeze_circuits(model, config):
        decode(model, IDS, None, cache, ((0, 5),))
    decode(model, IDS, None, cache, ((5, 9),))
    cache.crop(-2)
    with FREEZER.freeze_circuits(model, config), pytest.warns(StaleCacheWarning):
        decode(model, IDS, None, copy.deepcopy(cache), ((7, 8),))
    cache.crop(-2)
    with FREEZER.freeze_circuits(model, config):
        decode(model, IDS, None, cache, ((5, 6),))


def test_a_mark_keeps_no_cache_alive(model):
    with FREEZER.freeze_circuits(model, InterventionConfig([0], [1], "ov")):
        cache = DynamicCache()
        decode(model, IDS, None, cache)
        seen = weakref.ref(cache)
        gc.disable()
        try:
            del cache
            assert seen() is None
        finally:
            gc.enable()


def test_a_shallow_copy_that_outlives_its_cache_says_so(model):
    with FREEZER.freeze_circuits(model, InterventionConfig([0], [1], "ov")):
        cache = DynamicCache()
        decode(model, IDS, None, cache)
    shallow = copy.copy(cache)
    shallow.crop(-1)
    assert cache.get_seq_length() == 11
    del cache
    with pytest.raises(InterventionError, match="use copy"):
        shallow.crop(-1)


@pytest.mark.parametrize("scope", ["group", "head"])
@pytest.mark.parametrize("cache", [*CACHES, "quantised"])
def test_a_cache_of_each_kind_is_recomputed(model, cache, scope):
    config = InterventionConfig([0, 2], [1], kv_scope=scope)
    if cache == "quantised":
        pytest.importorskip("optimum.quanto", reason="the extra 'conditions' is not installed")
        if model.config.model_type == "mistral":
            model = tiny_model("llama_gqa")  # a quantised cache has no windows
    kind = CACHES.get(cache, quantised)
    given = {name: value[:, :8] for name, value in arguments(IDS, LEFT).items()}
    with FREEZER.freeze_circuits(model, config):
        filled = kind(model)
        assert FREEZER.recompute_cache(model, {**given, CACHE: filled}) is filled
        want = decode(model, IDS, LEFT, kind(model), ((0, 8), (8, 9)))
        assert torch.equal(decode(model, IDS, LEFT, filled, ((8, 9),)), want[:, -1:])


def test_what_a_cached_step_cannot_be_served_is_refused(model):
    recording = FREEZER.record(model, IDS)
    for fields, reason in (
        ({"freeze_type": "mean"}, "does not see"),
        ({"freeze_type": "noise"}, "does not see"),
        ({"freeze_type": "reference", "reference": recording}, "of its own length"),
    ):
        with (
            FREEZER.freeze_circuits(model, InterventionConfig(**fields)),
            pytest.raises(InterventionError, match=reason),
        ):
            decode(model, IDS, None, DynamicCache(), ((0, 12), (0, 1)))


def test_an_own_cache_is_used_without_a_word(model):
    with FREEZER.freeze_circuits(model, HEAD), warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(model, IDS, LEFT, DynamicCache())


def test_a_shallow_copy_shares_the_mark_as_it_shares_the_tokens():
    model = tiny_model("llama")
    with FREEZER.freeze_circuits(model, InterventionConfig([0], [1], "ov")), torch.no_grad():
        cache = cache_of(model(IDS[:, :4], use_cache=True))
        other = copy.copy(cache)
        model(IDS[:, 4:5], **{CACHE: cache})
        model(IDS[:, 5:6], **{CACHE: other})  # which holds five tokens, all of them frozen alike


def test_a_shallow_copy_that_is_cropped_and_grows_unfrozen_is_recognised():
    model, config = tiny_model("llama"), InterventionConfig([0], [1], "ov")
    with torch.no_grad():
        with FREEZER.freeze_circuits(model, config):
            cache = cache_of(model(IDS[:, :6], use_cache=True))
        other = copy.copy(cache)
        other.crop(-2)
        model(IDS[:, 4:6], **{CACHE: other}, use_cache=True)
        with FREEZER.freeze_circuits(model, config), pytest.raises(StaleCacheWarning):
            model(IDS[:, 6:7], **{CACHE: other})


def test_a_model_that_is_given_its_cached_tokens_again_is_refused():
    model = tiny_of_type("xlm", attn=None)
    with FREEZER.freeze_circuits(model, InterventionConfig([0])), torch.no_grad():
        model(IDS)
        cache = DynamicCache()
        model(IDS[:, :6], cache=cache)
        with pytest.raises(InterventionError, match="was given 7 tokens and added 1 to its cache of 6"):
            model(IDS[:, :7], cache=cache)


@pytest.mark.parametrize("part", [0, 1], ids=["self", "cross"])
def test_a_pair_of_caches_keeps_the_storage_of_either(part):
    pair = [DynamicCache(), DynamicCache()]
    check_emptied_cache(EncoderDecoderCache(*pair), "0|frozen")
    pair[part].update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), 0)
    check_emptied_cache(EncoderDecoderCache(*pair), "|frozen")
    with pytest.raises(InterventionError, match="stores other KV heads"):
        check_emptied_cache(EncoderDecoderCache(*pair), "0|frozen")


@pytest.mark.parametrize("first", ["ignore", "warn", "error"])
@pytest.mark.parametrize("second", ["ignore", "warn", "error"])
def test_the_strictest_of_several_freezes_says_what_a_stale_cache_is(first, second):
    model = tiny_model("llama")
    cache = cache_of(model(IDS, use_cache=True))
    with ExitStack() as stack:
        for layer, on_stale in ((0, first), (0, "ignore"), (1, second)):
            freezer = AttentionCircuitFreezer(on_stale_cache=on_stale)
            stack.enter_context(freezer.freeze_circuits(model, InterventionConfig([layer])))
        if "error" in (first, second):
            stack.enter_context(pytest.raises(InterventionError, match="this cache was filled without"))
        elif "warn" in (first, second):
            stack.enter_context(pytest.warns(StaleCacheWarning))
        model(IDS[:, :1], **{CACHE: cache})


def used_under_resample(model):
    cache = DynamicCache()
    with FREEZER.freeze_circuits(model, InterventionConfig([0], [1], "v", "resample")):
        decode(model, IDS, None, cache, ((0, 6),))
        yield cache
    yield cache


REORDERINGS = {
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
}


@pytest.mark.parametrize("how", REORDERINGS)
@pytest.mark.parametrize("kept", [lambda cache: cache, copy.deepcopy, copy.copy], ids=["itself", "deep", "shallow"])
def test_a_cache_that_was_used_under_resampling_reorders_once_the_freeze_is_removed(how, kept):
    model = tiny_model("llama")
    states = used_under_resample(model)
    cache = kept(next(states))
    with pytest.raises(InterventionError, match="rows of this cache are to be reordered"):
        REORDERINGS[how](cache)
    original = next(states)
    before = cache.layers[0].keys.clone()
    REORDERINGS[how](cache)
    assert torch.equal(cache.layers[0].keys, before.flip(0))
    assert original.get_seq_length() == cache.get_seq_length() == 6


def test_a_cache_that_was_pickled_under_resampling_is_in_no_freeze():
    states = used_under_resample(tiny_model("llama"))
    cache = pickle.loads(pickle.dumps(next(states)))
    before = cache.layers[0].keys.clone()
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(cache.layers[0].keys, before.flip(0))
