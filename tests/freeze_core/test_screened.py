"""A screened sweep: what is measured is what the exact sweep measures, and what is left out is bounded as it says."""

from __future__ import annotations

import pytest
import torch

from freeze_core import InterventionError, score_heads
from pytest_circuitfreeze.models import tiny_model

IDS = torch.arange(14).view(2, 7) * 5 % 97
CIRCUITS = ("qk", "ov")


def spread(logits):
    """A metric that every position and some words count in."""
    return logits[..., 5].sum(1) - logits[..., 7].sum(1)


def swept(model, method, **fields):
    return score_heads(model, IDS, spread, method, **{"circuits": CIRCUITS, "progress": False, **fields})


def ranked(scores):
    return scores.abs().flatten().argsort(descending=True, stable=True)


@pytest.mark.parametrize("scope", ["group", "head"])
@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "falcon_mqa"])
def test_what_is_measured_is_what_the_exact_sweep_measures_and_the_rest_is_estimated(name, scope):
    model = tiny_model(name).base_model  # nothing is unembedded together: the bits are the same
    exact, estimated = (swept(model, method, kv_scope=scope) for method in ("exact", "attribution"))
    found = swept(model, "screened", kv_scope=scope, top=2)
    assert found.method == "screened"
    assert found.clean == exact.clean
    for circuit in CIRCUITS:
        measured = found.exact[circuit]
        assert 2 <= int(measured.sum()) < 12
        assert bool(measured.flatten()[ranked(estimated.scores[circuit])[:2]].all())
        assert torch.equal(found.scores[circuit][measured], exact.scores[circuit][measured])
        assert torch.equal(found.scores[circuit][~measured], estimated.scores[circuit][~measured])
        assert bool(exact.exact[circuit].all())
        assert not bool(estimated.exact[circuit].any())


@pytest.mark.parametrize("fields", [{"top": 12}, {"top": 100}])
def test_screening_for_all_heads_is_the_exact_sweep(fields):
    model = tiny_model("mistral_gqa")
    exact, found = swept(model, "exact"), swept(model, "screened", **fields)
    assert all(torch.equal(found.scores[circuit], exact.scores[circuit]) for circuit in CIRCUITS)
    assert all(bool(found.exact[circuit].all()) for circuit in CIRCUITS)
    assert found.rest == {"qk": 0.0, "ov": 0.0}
    assert found.confidence == {"qk": 1.0, "ov": 1.0}


def larger():
    """A model of 48 heads, of which a part can be screened for less than a sweep of all."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": 6, "n_head": 8, "n_embd": 32, "vocab_size": 97, "initializer_range": 0.3}
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


def test_the_rest_is_bounded_by_the_largest_error_of_heads_that_were_drawn():
    model = larger()
    exact, estimated = swept(model, "exact"), swept(model, "attribution")
    found = swept(model, "screened", top=2, budget=0.6)
    for circuit in CIRCUITS:
        left = ~found.exact[circuit]
        assert bool(left.any())
        errors = (exact.scores[circuit] - estimated.scores[circuit]).abs()
        slack = found.rest[circuit] - float(estimated.scores[circuit][left].abs().max())
        assert float((errors[found.exact[circuit]] - slack).abs().min()) < 1e-4
        assert 0 < found.confidence[circuit] < 1


def test_heads_that_may_be_among_the_best_are_measured_as_long_as_the_budget_lasts():
    model = larger()
    measured = []
    for budget in (0.01, 0.6, 1.0):
        found = swept(model, "screened", top=2, budget=budget)
        measured.append(sum(int(one.sum()) for one in found.exact.values()))
    assert measured[0] == 4  # the best of each circuit, whatever is left
    assert 4 < measured[1] < measured[2]


def test_heads_that_cannot_enter_are_not_measured():
    model = larger()
    fields = {"strength": 0.001, "top": 2}  # where estimates hardly err
    found = swept(model, "screened", budget=1.0, **fields)
    best = swept(model, "exact", strength=0.001)
    for circuit in CIRCUITS:
        assert int(found.exact[circuit].sum()) < 20
        assert torch.equal(ranked(best.scores[circuit])[:2], ranked(found.scores[circuit])[:2])
        assert found.rest[circuit] < float(best.scores[circuit].abs().flatten().sort(descending=True).values[1])


def test_nothing_is_bounded_where_none_was_drawn():
    found = swept(tiny_model("gpt2"), "screened", top=1, budget=0.01)
    assert found.rest == {"qk": torch.inf, "ov": torch.inf}
    assert found.confidence == {"qk": 0.0, "ov": 0.0}


def test_a_screening_is_the_same_each_time():
    model = larger()
    before = torch.get_rng_state()
    one, two = (swept(model, "screened", top=2, budget=0.6) for _ in range(2))
    assert one.confidence["qk"] > 0
    assert all(torch.equal(one.scores[circuit], two.scores[circuit]) for circuit in CIRCUITS)
    assert (one.rest, one.confidence) == (two.rest, two.confidence)
    assert torch.equal(torch.get_rng_state(), before)


WRONG = {
    "top=0": {"method": "screened", "top": 0},
    "top=True": {"method": "screened", "top": True},
    "top=3: must be None": {"method": "attribution", "top": 3},
    "budget=0": {"method": "screened", "budget": 0},
    "budget=1.5": {"method": "screened", "budget": 1.5},
    "budget=nan": {"method": "screened", "budget": float("nan")},
    "budget=0.1: must be None": {"method": "exact", "budget": 0.1},
    "metric='kl'": {"method": "screened", "metric": "kl"},
    "checkpoint='kept'": {"method": "screened", "checkpoint": "kept"},
    "checkpoint='also kept'": {"method": "attribution", "checkpoint": "also kept"},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_screened_is_refused_before_anything_is_run(message):
    model = tiny_model("gpt2")
    model.register_forward_pre_hook(lambda *args: pytest.fail("the model was run"))
    with pytest.raises(InterventionError, match=message):
        score_heads(model, IDS, **{"metric": spread, "progress": False, **WRONG[message]})
