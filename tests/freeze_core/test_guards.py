"""Nothing silent: what would have gone wrong without a word."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from cache_names import CACHE, cache_of
from encoder_decoders import bart

from freeze_core import (
    AttentionCircuitFreezer,
    CircuitFreezeError,
    FreezeNotInForceError,
    InterventionConfig,
    InterventionError,
    StaleCacheWarning,
    UnsupportedModelError,
)
from pytest_circuitfreeze.models import tiny_model
from pytest_circuitfreeze.shrinking import tiny_of_type

FREEZER = AttentionCircuitFreezer()


def checkpointed(reentrant):
    model = tiny_model("llama").train()
    model.enable_input_require_grads()
    model._set_gradient_checkpointing(
        True, lambda *args, **options: torch.utils.checkpoint.checkpoint(*args, use_reentrant=reentrant, **options)
    )
    return model


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("later", [None, InterventionConfig([0], [2], "v"), InterventionConfig([0], [1], "v", seed=1)])
def test_recomputation_under_other_freezes_is_an_error(reentrant, later, ids):
    model = checkpointed(reentrant)
    with FREEZER.freeze_circuits(model, InterventionConfig([0], [1], "v", "noise")):
        loss = model(ids).logits.square().mean()
    frozen = FREEZER.freeze_circuits(model, later) if later else None
    with pytest.raises(FreezeNotInForceError, match="under other freezes"):
        loss.backward()
    if frozen:
        frozen.remove()


def test_recomputation_of_an_unfrozen_pass_under_a_freeze_is_an_error(ids):
    model = checkpointed(reentrant=True)
    loss = model(ids).logits.square().mean()
    with FREEZER.freeze_circuits(model, InterventionConfig([0], [1])), pytest.raises(FreezeNotInForceError):
        loss.backward()


@pytest.mark.parametrize("model_type", ["bert", "electra", "megatron-bert"])
def test_noise_is_the_same_with_a_cache_where_layers_see_hidden_states_only(model_type, ids):
    model = tiny_of_type(model_type, attn="eager")
    config = InterventionConfig([0], [0], "v", "noise", noise_std=1.0)
    with torch.no_grad(), FREEZER.freeze_circuits(model, config):
        whole = model(ids, use_cache=False).logits
        cache = cache_of(model(ids[:, :5], use_cache=True))
        step = model(ids[:, 5:], **{CACHE: cache}, use_cache=True).logits
    torch.testing.assert_close(step, whole[:, 5:], rtol=0, atol=1e-4 * float(whole.abs().max()))


def test_padding_is_left_out_where_layers_see_hidden_states_only(ids):
    model = tiny_of_type("bert", attn="eager")
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    other = torch.where(mask.bool(), ids, (ids + 1) % 97)
    with torch.no_grad(), FREEZER.freeze_circuits(model, InterventionConfig([0], None, "v", "mean")):
        one, two = (FREEZER.record(model, {"input_ids": given, "attention_mask": mask})[0].v for given in (ids, other))
    assert torch.equal(one, two)


def test_a_decoders_activations_are_recorded_under_its_own_mask(ids):
    model, mask = bart(), torch.tensor([[1] * 5 + [0] * 2, [1] * 7])
    given = {"input_ids": ids, "decoder_input_ids": ids}
    assert FREEZER.record(model, {**given, "attention_mask": mask}).attention_mask is None
    under = {**given, "decoder_attention_mask": mask}
    recording = FREEZER.record(model, under)
    assert torch.equal(recording.attention_mask, mask)
    assert FREEZER.calibrate(model, [under], progress=False).tokens == 12
    config = InterventionConfig([0], freeze_type="reference", reference=recording)
    with FREEZER.freeze_circuits(model, config):
        model(**under)
        with pytest.raises(InterventionError, match="another attention_mask"):
            model(**given)


@pytest.mark.parametrize("freeze_type", ["mean", "noise"])
def test_statistics_of_nothing_are_an_error(model, ids, freeze_type):
    config = InterventionConfig([0], [0], "v", freeze_type)
    with FREEZER.freeze_circuits(model, config), pytest.raises(InterventionError, match="no real token"):
        model(ids, attention_mask=torch.zeros_like(ids))


def test_a_projection_that_serves_two_layers_or_two_roles_is_refused():
    model = tiny_model("llama")
    layers = model.model.layers
    layers[2].self_attn.k_proj = layers[0].self_attn.k_proj
    with pytest.raises(UnsupportedModelError, match=r"k_proj of layer 0 and k_proj of layer 2"):
        FREEZER.freeze_circuits(model, InterventionConfig([0], None, "k"))
    FREEZER.freeze_circuits(model, InterventionConfig([1], None, "k")).remove()
    layers[1].self_attn.v_proj = layers[1].self_attn.k_proj
    with pytest.raises(UnsupportedModelError, match=r"one Linear serves"):
        FREEZER.freeze_circuits(model, InterventionConfig([1], None, "v"))


HANDLES = {
    "one": lambda frozen: frozen[0].remove(),
    "all": lambda frozen: frozen.remove(),
    "by the freezer": lambda frozen: FREEZER.remove_hooks(list(frozen)),
}


@pytest.mark.parametrize("how", HANDLES)
def test_a_freeze_is_not_removed_from_inside_a_pass(model, how, ids):
    """Layers before would have been frozen and those after not: everything stays in force, and can go afterwards."""
    layers = model.base_model.h if hasattr(model.base_model, "h") else model.base_model.layers
    configs = [InterventionConfig([0, 2], [1], "ov", kv_scope="head"), InterventionConfig([1], [1], "qk")]
    clean = model(ids).logits
    frozen = FREEZER.freeze_circuits(model, configs)
    expected, errors = model(ids).logits, []

    def remove(*args):
        with pytest.raises(CircuitFreezeError, match="a pass is running") as error:
            HANDLES[how](frozen)
        errors.append(error)

    hook = layers[1].register_forward_pre_hook(remove)
    assert torch.equal(model(ids).logits, expected)
    hook.remove()
    assert len(errors) == 1
    assert torch.equal(model(ids).logits, expected)
    frozen.remove()
    assert torch.equal(model(ids).logits, clean)


def test_a_freeze_is_not_added_inside_a_pass_of_a_frozen_model(ids):
    model = tiny_model("llama")
    with FREEZER.freeze_circuits(model, InterventionConfig([0])):
        expected = model(ids).logits
        model.model.layers[1].register_forward_pre_hook(
            lambda *args: FREEZER.freeze_circuits(model, InterventionConfig([2]))
        )
        with pytest.raises(CircuitFreezeError, match="a pass is running"):
            model(ids)
        model.model.layers[1]._forward_pre_hooks.clear()
        assert torch.equal(model(ids).logits, expected)


def test_a_cache_that_grew_unfrozen_is_recognised(model, ids):
    config = InterventionConfig([0], [1], "ov")
    with torch.no_grad():
        with FREEZER.freeze_circuits(model, config):
            cache = cache_of(model(ids[:, :3], use_cache=True))
        model(ids[:, 3:6], **{CACHE: cache}, use_cache=True)
        with FREEZER.freeze_circuits(model, config), pytest.warns(StaleCacheWarning):
            model(ids[:, 6:], **{CACHE: cache})


def test_a_live_freeze_does_not_follow_its_recording_or_its_statistics(model, ids):
    recording = FREEZER.record(model, (ids + 3) % 97)
    statistics = FREEZER.calibrate(model, [ids], progress=False)
    for config in (
        InterventionConfig([0], None, "v", "reference", reference=recording),
        InterventionConfig([0], None, "v", "mean", statistics=statistics),
    ):
        with FREEZER.freeze_circuits(model, config):
            before = model(ids).logits
            recording[0].v.zero_()
            statistics[0].mean["v"].zero_()
            assert torch.equal(model(ids).logits, before)


def test_a_reference_recorded_with_heads_of_their_own_does_not_lose_them(ids):
    model = tiny_model("llama_gqa")
    with FREEZER.freeze_circuits(model, InterventionConfig([0], [1], "ov", kv_scope="head")):
        recording = FREEZER.record(model, ids)
    with pytest.raises(InterventionError, match="each having their own"):
        FREEZER.freeze_circuits(model, InterventionConfig([0], None, "v", "reference", reference=recording))
    config = InterventionConfig([0], None, "k", "reference", reference=recording)  # k was repeated, no more
    FREEZER.freeze_circuits(model, config).remove()


def test_the_same_freeze_through_the_base_model_knows_its_cache(ids):
    model = tiny_model("llama_gqa")
    config = InterventionConfig([0], [1], "ov", kv_scope="head")
    with torch.no_grad(), FREEZER.freeze_circuits(model, config):
        cache = cache_of(model(ids[:, :6], use_cache=True))
    with torch.no_grad(), FREEZER.freeze_circuits(model.model, copy.copy(config)):
        model(ids[:, 6:], **{CACHE: cache})


def test_a_stated_storage_is_checked_while_frozen(ids):
    model = tiny_model("llama")
    frozen = FREEZER.freeze_circuits(model, InterventionConfig([0]))
    with pytest.raises(UnsupportedModelError, match="is separate_qkv"):
        FREEZER.freeze_circuits(model, InterventionConfig([0]), "fused_qkv")
    frozen.remove()


BAD_CALLS = {
    "config": lambda model: FREEZER.check_gradient_behavior(model, torch.zeros(1, 2).long(), "qk"),
    "effect": lambda model: FREEZER.verify_intervention_effect(model, model, torch.zeros(1, 2).long(), None),
    "recompute": lambda model: FREEZER.recompute_cache("gpt2", torch.zeros(1, 2).long()),
    "handles none": lambda model: FREEZER.remove_hooks(None),
    "handles number": lambda model: FREEZER.remove_hooks([1]),
    "handles text": lambda model: FREEZER.remove_hooks("a"),
    "batches": lambda model: FREEZER.calibrate(model, None, progress=False),
    "batches number": lambda model: FREEZER.calibrate(model, 0, progress=False),
    "progress": lambda model: FREEZER.calibrate(model, [torch.zeros(1, 2).long()], progress="no"),
    "pattern": lambda model: FREEZER.record(model, torch.zeros(1, 2).long(), pattern=1),
    "names": lambda model: FREEZER.record(model, {1: 2}),
    "nothing": lambda model: FREEZER.record(model, {}),
    "empty": lambda model: FREEZER.record(model, torch.zeros(0, 2).long()),
    "no ids": lambda model: FREEZER.record(model, {"attention_mask": torch.ones(1, 2)}),
    "out of vocabulary": lambda model: FREEZER.record(model, torch.full((1, 2), 10_000)),
    "strength": lambda model: InterventionConfig(strength=10**400),
    "noise": lambda model: InterventionConfig(noise_std=10**400),
    "huge": lambda model: InterventionConfig(strength=10**5000),
    "index": lambda model: FREEZER.freeze_circuits(model, InterventionConfig([10**5000])),
    "meta": lambda model: FREEZER.freeze_circuits(
        model,
        InterventionConfig(
            freeze_type="reference", reference=FREEZER.record(model, torch.ones(1, 2).long(), device="meta")
        ),
    ),
    "stale": lambda model: AttentionCircuitFreezer(on_stale_cache=torch.zeros(2)),
    "architecture": lambda model: FREEZER.freeze_circuits(model, InterventionConfig(), architecture=torch.zeros(2)),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_call_is_refused_and_leaves_the_model_alone(name):
    model = tiny_model("gpt2")
    with pytest.raises(CircuitFreezeError):
        BAD_CALLS[name](model)
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())


def test_a_seed_of_any_size_draws(model, ids):
    with FREEZER.freeze_circuits(model, InterventionConfig([0], freeze_type="noise", seed=-(10**5000))):
        assert model(ids).logits.isfinite().all()


SOME_KEYS = {"layer_indices": [0], "circuit": "k", "kv_scope": "head"}


@pytest.mark.parametrize(
    "configs",
    [
        [InterventionConfig(head_indices=[0], **SOME_KEYS), InterventionConfig(head_indices=[1, 2, 3], **SOME_KEYS)],
        [InterventionConfig(head_indices=[0], strength=0.0, **SOME_KEYS), InterventionConfig(**SOME_KEYS)],
    ],
)
def test_configs_that_can_only_be_held_together_are_refused(configs):
    # Removed one after the other, the last would be left with what the layer cannot hold, and stay in the model.
    model = tiny_model("deepseek_v3")
    with pytest.raises(UnsupportedModelError, match="in one config"):
        FREEZER.freeze_circuits(model, configs)
    assert not any("forward" in vars(module) for module in model.modules())


def sharing(model):
    """Another model that holds the same layers, in reverse."""
    other = tiny_model("llama", seed=1)
    other.model.layers = torch.nn.ModuleList(reversed(model.model.layers))
    return other


def test_a_model_that_shares_frozen_layers_is_recorded_in_its_own_order(ids):
    model = tiny_model("llama")
    other = sharing(model)
    expected = [FREEZER.record(other, ids)[layer] for layer in (0, 2)]
    with FREEZER.freeze_circuits(model, InterventionConfig([0], [1], "v")):  # the other one's last
        first, last = (FREEZER.record(other, ids)[layer] for layer in (0, 2))
    assert torch.equal(first.z, expected[0].z)
    assert torch.equal(last.q, expected[1].q)
    assert torch.equal(last.v[:, :, 1], torch.zeros_like(last.v[:, :, 1]))


def test_a_layer_is_frozen_through_one_model_at_a_time(ids):
    model = tiny_model("llama")
    other = sharing(model)
    with FREEZER.freeze_circuits(model, InterventionConfig([0], [1], "v")):
        with pytest.raises(InterventionError, match="through another LlamaModel that holds the same layer"):
            FREEZER.freeze_circuits(other, InterventionConfig([2], [0], "v"))
        FREEZER.freeze_circuits(other, InterventionConfig([0], [0], "v")).remove()
        FREEZER.freeze_circuits(model.model, InterventionConfig([0], [0], "v")).remove()
    assert not any("forward" in vars(module) for module in (*model.modules(), *other.modules()))


def test_a_cache_that_another_model_brings_to_a_frozen_layer_is_no_quiet_thing(ids):
    model = tiny_model("llama")
    other = sharing(model)
    stale = cache_of(other(ids, use_cache=True))
    with FREEZER.freeze_circuits(model, InterventionConfig([0], [1], "v")):
        other(ids, use_cache=False)
        with pytest.raises(FreezeNotInForceError, match="freeze it through the model that runs it"):
            other(ids[:, :1], **{CACHE: stale})


def test_a_forward_that_somebody_keeps_is_unfrozen_once_the_freeze_is_removed(ids):
    model = tiny_model("llama")
    attention = model.model.layers[0].self_attn
    expected = model(ids).logits
    with FREEZER.freeze_circuits(model, InterventionConfig([0], [1], "v")):
        kept = attention.forward
    attention.forward = kept
    assert torch.equal(model(ids, use_cache=True).logits, expected)


def frozen_in_cross_attention():
    config = transformers.BartConfig(
        vocab_size=50,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=32,
    )
    model = transformers.BartForConditionalGeneration(config).eval()
    return model, FREEZER.freeze_circuits(model, InterventionConfig([0], attention="cross"))


def test_a_freeze_of_cross_attention_is_seen_where_an_unfrozen_model_is_asked_for():
    ids = torch.arange(10).view(2, 5) + 4
    model, frozen = frozen_in_cross_attention()
    with pytest.raises(InterventionError, match="model is frozen: remove its freezes first"):
        FREEZER.calibrate(model, [ids], progress=False)
    with pytest.raises(InterventionError, match="model_baseline is frozen"):
        FREEZER.verify_intervention_effect(model, model, ids, InterventionConfig([0]))
    frozen.remove()
    FREEZER.calibrate(model, [ids], progress=False)
