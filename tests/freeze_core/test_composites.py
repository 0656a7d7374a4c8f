"""Models around a language model that make masks of their own of the padding mask before it sees any."""

from __future__ import annotations

import pytest
import torch

from freeze_core import (
    AttentionCircuitFreezer,
    InterventionConfig,
    InterventionError,
    pattern_scores,
    score_heads,
)
from freeze_core.attention.sites import find_sites
from pytest_circuitfreeze.models import tiny_model

FREEZER = AttentionCircuitFreezer()
ENTRIES = ("", "model", "model.language_model")
MEAN = InterventionConfig([0], freeze_type="mean", circuit="ov")


@pytest.fixture
def model():
    return tiny_model("gemma3")


@pytest.fixture
def mask():
    return torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]])


def hidden(model, entry, ids, mask):
    """The last hidden states, or the logits, of the real tokens, entered at the path `entry`."""
    with torch.no_grad():
        return model.get_submodule(entry)(input_ids=ids, attention_mask=mask)[0][mask.bool()]


@pytest.mark.parametrize("frozen_at", ENTRIES)
@pytest.mark.parametrize("entry", ENTRIES)
def test_padding_plays_no_part_wherever_the_model_is_entered(model, ids, mask, frozen_at, entry):
    other = torch.where(mask.bool(), ids, (ids + 1) % 97)
    with FREEZER.freeze_circuits(model.get_submodule(frozen_at), MEAN):
        if frozen_at == "model.language_model" != entry:
            # Nothing outside of what was frozen is touched, so that nothing there can be asked.
            with pytest.raises(InterventionError, match="attention_mask is a dict"):
                hidden(model, entry, ids, mask)
            return
        assert torch.equal(hidden(model, entry, ids, mask), hidden(model, entry, other, mask))


def test_without_a_mask_all_tokens_are_real(model, ids):
    with FREEZER.freeze_circuits(model, MEAN), torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids, attention_mask=torch.ones_like(ids)).logits)


def test_a_freeze_of_the_whole_helps_one_of_the_part(model, ids, mask):
    with FREEZER.freeze_circuits(model.model.language_model, MEAN) as part:
        want = hidden(model, "model.language_model", ids, mask)
        with FREEZER.freeze_circuits(model, InterventionConfig([1])):
            assert torch.isfinite(hidden(model, "", ids, mask)).all()
            assert not torch.equal(hidden(model, "model.language_model", ids, mask), want)
        part.remove()
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_recording_keeps_the_padding_mask_and_statistics_leave_padding_out(model, ids, mask):
    other = torch.where(mask.bool(), ids, (ids + 1) % 97)
    batches = [{"input_ids": tokens, "attention_mask": mask} for tokens in (ids, other)]
    assert torch.equal(FREEZER.record(model, batches[0]).attention_mask, mask)
    assert FREEZER.record(model, ids).attention_mask is None
    first, second = (FREEZER.calibrate(model, [batch], [0], progress=False) for batch in batches)
    assert first.tokens == int(mask.sum())
    assert torch.equal(first[0].mean["v"], second[0].mean["v"])


def test_a_mask_that_tells_no_padding_cannot_be_recorded_under(model, ids):
    masks = {"full_attention": None, "sliding_attention": None}
    with pytest.raises(InterventionError, match="attention_mask is a dict"):
        FREEZER.record(model, {"input_ids": ids, "attention_mask": masks})


def test_the_words_of_a_composite_are_those_of_its_language_model(model, ids):
    assert "vocab_size" not in model.config.to_diff_dict()
    with pytest.raises(InterventionError, match="must be ids in 0 to 96"):
        score_heads(model, ids, "probability", targets=97, progress=False)
    assert pattern_scores(model, 6, 2, progress=False).values["previous_token"].shape == (3, 4)


def test_a_model_that_hands_its_padding_mask_on_is_no_composite(model):
    assert find_sites(model).composite is model.model
    assert find_sites(tiny_model("llama")).composite is None
    assert find_sites(tiny_model("gpt2")).composite is None


def test_what_covers_the_composite_is_not_thrown_away(model):
    frozen = FREEZER.freeze_circuits(model, MEAN)
    covered = model.model.forward
    model.model.forward = lambda *args, **kwargs: covered(*args, **kwargs)
    with pytest.raises(ValueError, match="Gemma3Model was replaced again"):
        frozen.remove()
    model.model.forward = covered
    frozen.remove()
    assert not any("forward" in vars(module) for module in model.modules())
