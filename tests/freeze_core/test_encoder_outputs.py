"""What an encoder gave before it was frozen is not decoded from under its freeze without a word."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from cache_names import CACHE, cache_of
from encoder_decoders import bart
from transformers.modeling_outputs import BaseModelOutput

from freeze_core import (
    AttentionCircuitFreezer,
    FreezeNotInForceError,
    InterventionConfig,
    InterventionError,
    StaleCacheWarning,
    score_heads,
)
from pytest_circuitfreeze.models import tiny_model

SOURCE = torch.arange(3, 17).view(2, 7)
TARGET = torch.arange(3, 13).view(2, 5)
CONFIG = InterventionConfig([0], None, "ov", attention="encoder")
OTHER = InterventionConfig([0], None, "ov", attention="encoder", strength=0.5)
FREEZER = AttentionCircuitFreezer()

FORMS = {
    "output": lambda states: BaseModelOutput(last_hidden_state=states),
    "tuple": lambda states: (states,),
    "copy": lambda states: (states.clone(),),
    "rows of beams": lambda states: (states.repeat_interleave(2, 0)[::2],),
    "reordered": lambda states: (states.flip(0),),
}


def encoded(model):
    return model.get_encoder()(input_ids=SOURCE).last_hidden_state


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_encoder_outputs_from_before_the_freeze_are_an_error(form):
    model = bart()
    before = FORMS[form](encoded(model))
    with FREEZER.freeze_circuits(model, CONFIG):
        with pytest.raises(FreezeNotInForceError, match="encoder_outputs given to BartModel were not computed under"):
            model(encoder_outputs=before, decoder_input_ids=TARGET)
        made = FORMS[form](encoded(model))
        found = model(encoder_outputs=made, decoder_input_ids=TARGET).logits
        source = SOURCE.flip(0) if form == "reordered" else SOURCE
        torch.testing.assert_close(found, model(input_ids=source, decoder_input_ids=TARGET).logits)
    model(encoder_outputs=before, decoder_input_ids=TARGET)


@torch.no_grad()
def test_encoder_outputs_of_another_freeze_are_an_error():
    model = bart()
    with FREEZER.freeze_circuits(model, CONFIG):
        before = model.get_encoder()(input_ids=SOURCE)
    with FREEZER.freeze_circuits(model, OTHER), pytest.raises(FreezeNotInForceError):
        model(encoder_outputs=before, decoder_input_ids=TARGET)
    with FREEZER.freeze_circuits(model, CONFIG):
        model.get_encoder()(input_ids=SOURCE)
        model(encoder_outputs=before, decoder_input_ids=TARGET)  # the same bits under the same freeze


@torch.no_grad()
def test_encoder_outputs_are_checked_however_the_model_is_entered():
    model = bart()
    before = model.get_encoder()(input_ids=SOURCE)
    with FREEZER.freeze_circuits(model, CONFIG):
        for entry in (model, model.model):
            with pytest.raises(FreezeNotInForceError):
                entry(encoder_outputs=before, decoder_input_ids=TARGET)
        with pytest.raises(FreezeNotInForceError):
            model.generate(encoder_outputs=before, decoder_input_ids=TARGET, max_new_tokens=2)


@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_generation_under_a_frozen_encoder_is_that_of_whole_passes(beams):
    model = bart()
    options = {"max_new_tokens": 4, "num_beams": beams, "do_sample": False}
    with FREEZER.freeze_circuits(model, CONFIG), warnings.catch_warnings():
        warnings.simplefilter("error", StaleCacheWarning)
        cached = model.generate(SOURCE, use_cache=True, **options)
        assert torch.equal(cached, model.generate(SOURCE, use_cache=False, **options))


@pytest.mark.parametrize("on_stale", ["ignore", "warn", "error"])
@torch.no_grad()
def test_a_cache_of_another_encoder_is_stale(on_stale):
    model, freezer = bart(), AttentionCircuitFreezer(on_stale_cache=on_stale)

    def fill():
        return cache_of(model(input_ids=SOURCE, decoder_input_ids=TARGET[:, :2], use_cache=True))

    def step(cache):
        given = {CACHE: copy.deepcopy(cache), "use_cache": True}
        return model(encoder_outputs=(encoded(model),), decoder_input_ids=TARGET[:, 2:3], **given)

    stale = fill()
    with freezer.freeze_circuits(model, OTHER):
        other = fill()
    with freezer.freeze_circuits(model, CONFIG), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(fill())
        assert not caught
        for cache in (stale, other):
            if on_stale == "error":
                with pytest.raises(InterventionError, match="an encoder that was not frozen as it is now"):
                    step(cache)
            else:
                step(cache)
    assert len(caught) == (2 if on_stale == "warn" else 0)


def test_heads_of_an_encoder_are_not_scored_on_its_outputs():
    model = bart()
    with torch.no_grad():
        inputs = {"encoder_outputs": (encoded(model),), "decoder_input_ids": TARGET}
    with pytest.raises(FreezeNotInForceError, match="encoder_outputs"):
        score_heads(model, inputs, "logit_difference", targets=(5, 7), attention="encoder")


def test_removal_leaves_no_trace_on_the_encoder_and_around_it():
    model = bart()
    before = [(module, dict(vars(module))) for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with FREEZER.freeze_circuits(model, CONFIG), FREEZER.freeze_circuits(model, OTHER):
        pass
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(vars(module).keys() == was.keys() for module, was in before)


@torch.no_grad()
def test_a_decoder_of_its_own_is_not_asked_for_encoder_outputs():
    model = tiny_model("gpt2")
    with FREEZER.freeze_circuits(model, InterventionConfig([0])):
        model(SOURCE)
