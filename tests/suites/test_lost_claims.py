"""A claim does not drop out unseen: what a library renamed is an error of the judge, not a claim without a subject."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from freeze_core import InterventionConfig
from pytest_circuitfreeze.engines import FreezeCore
from pytest_circuitfreeze.models import tiny_model
from pytest_circuitfreeze.required_claims import ALL_CLAIMS_APPLY, lost_claim
from pytest_circuitfreeze.shrinking import tiny_of_type
from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.caching import (
    check_cached_equals_recomputed,
    check_foreign_caches_are_recognised,
    check_recomputation_is_the_same_pass,
)
from pytest_circuitfreeze.suites.claims import NotApplicable
from pytest_circuitfreeze.suites.entering import check_every_way_in_is_frozen
from pytest_circuitfreeze.suites.judge.decoding import WITHOUT_CACHE, cache_argument
from pytest_circuitfreeze.suites.judge.judged_sites import CannotJudge
from pytest_circuitfreeze.suites.unservable import check_what_cannot_be_served_is_an_error

CONFIG = InterventionConfig([0], [1], "ov")
MEAN = InterventionConfig([0], [1], "ov", "mean")
BATCH = Batch(torch.arange(14).view(2, 7))


class RenamedArgument(LlamaForCausalLM):
    """Takes its cache under a name that nobody knows."""

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        kv_store=None,
        inputs_embeds=None,
        use_cache=None,
        return_dict=True,
    ):
        cache = {} if kv_store is None else cache_argument(tiny_model("llama"), kv_store)
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        return super().forward(input_ids, **given, **cache, use_cache=use_cache, return_dict=return_dict)


class RefusesItsCache(RenamedArgument):
    """Raises for a cache under the former name, as where deprecation warnings are errors."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None):
        if past_key_values is not None:
            raise FutureWarning("past_key_values is deprecated: use kv_store")
        return super().forward(input_ids, attention_mask, position_ids, use_cache=use_cache)


class ReturnsNoCache(RenamedArgument):
    """Returns its logits alone, whatever it is asked."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, use_cache=None):
        return CausalLMOutputWithPast(logits=super().forward(input_ids, attention_mask, position_ids).logits)


class ForgetsItsCache(RenamedArgument):
    """Runs a step without the tokens before it and gives logits of another length."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, use_cache=None):
        output = super().forward(input_ids, use_cache=use_cache)
        return output if cache is None else CausalLMOutputWithPast(None, output.logits[:, :0], cache)


class RenamedAmongOthers(RenamedArgument):
    """Takes its cache under a name that nobody knows, and any other argument without reading it."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, kv_store=None, use_cache=None, **kwargs):
        return super().forward(input_ids, attention_mask, position_ids, kv_store, use_cache=use_cache)


class KeepsFormerName(RenamedArgument):
    """Still takes its cache under the former name and reads the new one."""

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, cache=None, kv_store=None, use_cache=None
    ):
        return super().forward(input_ids, attention_mask, position_ids, kv_store, use_cache=use_cache)


CLAIMS = {
    "cached equals recomputed": lambda model: check_cached_equals_recomputed(
        FreezeCore(), model, CONFIG, BATCH, [4, 7]
    ),
    "foreign caches are recognised": lambda model: check_foreign_caches_are_recognised(
        FreezeCore(), model, CONFIG, BATCH, 4
    ),
    "statistics of a cached step are errors": lambda model: check_what_cannot_be_served_is_an_error(
        FreezeCore(), model, MEAN, BATCH, 4
    ),
}


def model_of(kind):
    model = tiny_model("llama")
    model.__class__ = kind
    return model


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("kind", [RenamedArgument, RefusesItsCache, ReturnsNoCache])
def test_a_model_whose_cache_is_out_of_reach_is_an_error(kind, claim):
    with pytest.raises(CannotJudge, match="must go on from a cache"):
        CLAIMS[claim](model_of(kind))


def test_a_model_that_does_not_go_on_from_its_cache_is_an_error():
    with pytest.raises(CannotJudge, match="gave logits of 4 columns for 7 tokens"):
        CLAIMS["cached equals recomputed"](model_of(ForgetsItsCache))


@pytest.mark.parametrize("claim", ["cached equals recomputed", "foreign caches are recognised"])
@pytest.mark.parametrize("kind", [RenamedAmongOthers, KeepsFormerName])
def test_a_model_that_takes_a_cache_and_does_not_read_it_is_an_error(kind, claim):
    with pytest.raises(CannotJudge, match="must go on from a cache, and gave the same logits"):
        CLAIMS[claim](model_of(kind))


@pytest.mark.parametrize("name", sorted(WITHOUT_CACHE.keys() & {"openai-gpt", "xlm"}))
def test_a_type_that_is_listed_without_a_cache_is_not_applicable(name):
    with pytest.raises(NotApplicable, match="does not go on from a cache: it"):
        CLAIMS["cached equals recomputed"](tiny_of_type(name, attn=None))


def test_gradient_checkpointing_that_has_no_effect_is_an_error(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(type(model), "_set_gradient_checkpointing", lambda *_, **__: None)
    with pytest.raises(CannotJudge, match="nothing ran again"):
        check_recomputation_is_the_same_pass(FreezeCore(), model, CONFIG, BATCH, BATCH)


def test_a_known_family_that_cannot_be_called_in_each_way_is_an_error(monkeypatch):
    model = tiny_model("llama")
    forward = LlamaForCausalLM.forward

    def renamed(self, *args, **kwargs):
        if "inputs_embeds" in kwargs:
            raise TypeError("inputs_embeds is called embeddings now")
        return forward(self, *args, **kwargs)

    renamed.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(LlamaForCausalLM, "forward", renamed)
    with pytest.raises(CannotJudge, match="can be called in each way, and raised TypeError: inputs_embeds"):
        check_every_way_in_is_frozen(FreezeCore(), model, CONFIG, BATCH)


def test_claims_that_must_apply_are_of_the_default_architectures_and_the_built_in_engine():
    assert "must apply to llama, and was found not to: no cache" in lost_claim("llama", "freeze_core", "no cache")
    assert not lost_claim("llama", "freeze_core", "")
    assert not lost_claim("llama", "hooks", "no cache")
    assert not lost_claim("xlm", "freeze_core", "no cache")
    assert not lost_claim(None, "freeze_core", "no cache")


def test_the_default_architectures_are_those_about_which_every_claim_says_something():
    from pytest_circuitfreeze.options import DEFAULT_ARCHITECTURES

    assert tuple(DEFAULT_ARCHITECTURES.split(",")) == ALL_CLAIMS_APPLY


def test_a_claim_that_drops_out_fails_the_run(pytester):
    """About an architecture of which it must say something, and about no other."""
    pytester.makeconftest(
        """
        def pytest_collection_finish():
            import pytest_circuitfreeze.suites.test_caching as tests
            from pytest_circuitfreeze.suites.claims import NotApplicable

            def check(*_):
                raise NotApplicable("takes no past_key_values")

            tests.check_recomputation_is_the_same_pass = check
        """
    )
    options = ["--circuitfreeze", "--circuitfreeze-arch", "llama,qwen2", "--circuitfreeze-profile", "quick"]
    result = pytester.runpytest_subprocess(*options, "circuitfreeze/test_caching.py", "-k", "recomputation")
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(["*must apply to llama, and was found not to: takes no past_key_values*"])
