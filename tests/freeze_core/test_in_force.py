"""A freeze is in force or it is an error: what was put on top of it, or took its place, after it was put in."""

from __future__ import annotations

import pytest
import torch

from freeze_core import (
    AttentionCircuitFreezer,
    CircuitFreezeError,
    FreezeNotInForceError,
    InterventionConfig,
    InterventionError,
)
from pytest_circuitfreeze.models import tiny_model

FREEZER = AttentionCircuitFreezer()


@pytest.mark.parametrize("what", ["layer", "attention"])
def test_what_was_replaced_after_the_freeze_is_not_taken_for_frozen(what, ids):
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    layers = model.model.layers
    frozen = FREEZER.freeze_circuits(model, InterventionConfig([0]))
    before = layers[0].self_attn
    if what == "layer":
        layers[0] = other.model.layers[0]
    else:
        layers[0].self_attn = other.model.layers[0].self_attn
    with pytest.raises(FreezeNotInForceError, match=r"layers\.0\.self_attn .* was wrapped or replaced"):
        model(ids)
    frozen.remove()
    assert "forward" not in vars(before)
    model(ids)


def test_a_second_freeze_over_a_covered_one_is_refused_and_changes_nothing(ids):
    model = tiny_model("mistral_gqa")
    attention = model.model.layers[1].self_attn
    first = FREEZER.freeze_circuits(model, InterventionConfig([0, 1], [0], "qk", kv_scope="head"))
    frozen = model(ids).logits
    for module in (attention, attention.q_proj, model.model):
        standing = module.forward
        module.forward = lambda *args, standing=standing, **kwargs: standing(*args, **kwargs)
        with pytest.raises(CircuitFreezeError, match="replaced again"):
            FREEZER.freeze_circuits(model, InterventionConfig([0, 1], [1], "ov"))
        with pytest.raises(CircuitFreezeError, match="replaced again"):
            first.remove()
        module.forward = standing
        assert torch.equal(model(ids).logits, frozen)
    first.remove()
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_removal_that_is_refused_leaves_every_layer_frozen(ids):
    model = tiny_model("llama")
    frozen = FREEZER.freeze_circuits(model, [InterventionConfig([0, 2]), InterventionConfig([1])])
    expected = model(ids).logits
    for layer, remove in ((1, frozen.remove), (0, frozen[0].remove)):
        attention = model.model.layers[layer].self_attn
        standing = attention.forward
        attention.forward = lambda *args, standing=standing, **kwargs: standing(*args, **kwargs)
        with pytest.raises(CircuitFreezeError, match="replaced again"):
            remove()
        attention.forward = standing
        assert torch.equal(model(ids).logits, expected)
    frozen.remove()
    assert not any("forward" in vars(module) for module in model.modules())


def test_layers_that_the_model_itself_skips_are_no_misses(ids):
    """LayerDrop in training: a layer that does not run has nothing to freeze."""
    model = tiny_model("opt").train()
    model.model.decoder.layerdrop = 1.0
    with FREEZER.freeze_circuits(model, InterventionConfig(freeze_type="mean")):
        skipped = model(ids, use_cache=False).logits
    assert torch.equal(skipped, model(ids, use_cache=False).logits)
    model.model.decoder.layerdrop = 0.0
    assert not torch.equal(skipped, model(ids, use_cache=False).logits)


def test_a_projection_that_runs_twice_in_one_attention_is_an_error(ids):
    model = tiny_model("llama")
    attention = model.model.layers[0].self_attn
    own = attention.forward

    def twice(hidden_states, *args, **kwargs):
        attention.v_proj(hidden_states)
        return own(hidden_states, *args, **kwargs)

    attention.forward = twice
    for mode in ("stopgrad", "circuit_ste"):
        with FREEZER.freeze_circuits(model, InterventionConfig([0], [1], "v", backward_mode=mode)):
            with pytest.raises(FreezeNotInForceError, match="ran its v_proj 2 times"):
                model(ids)
            attention.v_proj(model.model.embed_tokens(ids))  # by itself it may run as often as it likes
            attention.v_proj(model.model.embed_tokens(ids))


def test_projections_that_give_tokens_before_rows_are_an_error(ids):
    model = tiny_model("llama")
    projection = model.model.layers[0].self_attn.v_proj
    own = projection.forward
    projection.forward = lambda hidden: own(hidden).transpose(0, 1)
    freeze = InterventionConfig([0], [1], "v")
    with FREEZER.freeze_circuits(model, freeze), pytest.raises(FreezeNotInForceError, match="taken for tokens"):
        model(ids)


def test_attention_whose_own_forward_was_put_back_is_an_error(ids):
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    with FREEZER.freeze_circuits(model, InterventionConfig([1], [0])):
        attention.forward = type(attention).forward.__get__(attention)
        with pytest.raises(FreezeNotInForceError, match=r"layers\.1\.self_attn of LlamaModel was wrapped or replaced"):
            model(ids)
    del attention.forward
    model(ids)


@pytest.mark.parametrize("what", ["layers.1", "layers.1.self_attn"])
def test_a_frozen_attention_that_is_covered_and_does_not_run_is_an_error(what, ids):
    model, other = tiny_model("llama"), tiny_model("llama")
    covered = model.model.get_submodule(what)
    with FREEZER.freeze_circuits(model, InterventionConfig([0, 1])):
        own = covered.forward
        covered.forward = lambda *args, **kwargs: own(*args, **kwargs)
        model(ids)  # what is on top runs it
        covered.forward = other.model.get_submodule(what).forward
        with pytest.raises(FreezeNotInForceError, match=r"layers\.1\.self_attn of LlamaModel was wrapped or replaced"):
            model(ids)
        covered.forward = own


def test_a_layer_of_a_list_that_was_cut_and_put_together_anew_is_not_taken_for_the_frozen_one(ids):
    model, other = tiny_model("llama"), tiny_model("llama")
    first = model.model.layers[0]
    with FREEZER.freeze_circuits(model, InterventionConfig([0])):
        del model.model.layers[-1]
        model.model.layers[0] = other.model.layers[0]
        with pytest.raises(FreezeNotInForceError, match=r"layers\.0\.self_attn of LlamaModel was wrapped or replaced"):
            model(ids)
        model.model.layers[0] = first


def test_a_frozen_model_is_known_as_frozen_under_whatever_was_put_on_top(ids):
    model = tiny_model("gpt2")
    attention = model.transformer.h[0].attn
    with FREEZER.freeze_circuits(model, InterventionConfig([0])):
        frozen = attention.forward
        attention.forward = lambda *args, **kwargs: frozen(*args, **kwargs)
        with pytest.raises(InterventionError, match="model is frozen"):
            FREEZER.calibrate(model, [ids], progress=False)
        attention.forward = frozen
    FREEZER.calibrate(model, [ids], progress=False)


def test_layers_that_were_replaced_as_a_whole_are_told_at_the_end(ids):
    model, other = tiny_model("llama"), tiny_model("llama")
    own = model.model
    frozen = FREEZER.freeze_circuits(model, InterventionConfig([0], [1]))
    model.model = other.model
    model(ids)
    with pytest.raises(FreezeNotInForceError, match="model of the model was replaced after the freeze, and passes"):
        frozen.remove()
    frozen.remove()
    model.model = own
    assert torch.equal(model(ids).logits, tiny_model("llama")(ids).logits)


def test_layers_that_something_was_put_around_run_as_frozen_ones(ids):
    class Around(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    model = tiny_model("llama")
    with FREEZER.freeze_circuits(model, InterventionConfig([0], [1])):
        frozen = model(ids).logits
        own, model.model = model.model, Around(model.model)
        assert torch.equal(model(ids).logits, frozen)
    model.model = own
