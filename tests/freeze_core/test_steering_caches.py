"""A vector in passes that go on from a cache: as one pass would be, or refused, or told of."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from cache_names import CACHE, cache_of
from steered import DEFAULT, IDS, LEFT, logits, vector_of
from torch import Tensor
from transformers import DynamicCache

from freeze_core import InterventionError, StaleCacheWarning
from pytest_circuitfreeze.models import tiny_model


@pytest.mark.parametrize("positions", ["all", range(3, 5), range(5, 100), range(1)], ids=str)
@pytest.mark.parametrize("mask", [None, LEFT], ids=["whole", "padded"])
@pytest.mark.parametrize("architecture", DEFAULT)
def test_cached_steps_are_what_one_pass_is(architecture: str, mask: Tensor | None, positions: Any) -> None:
    model = tiny_model(architecture)
    vector = vector_of(model)

    def given(end: int) -> dict[str, Any]:
        return {} if mask is None else {"attention_mask": mask[:, :end], "position_ids": _places(mask)[:, :end]}

    with vector.apply(model, 2.0, positions), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        whole = logits(model, **given(7))
        cache, steps = DynamicCache(config=model.config), []
        for start, end in ((0, 4), (4, 5), (5, 7)):
            more = given(end)
            if mask is not None:
                more["position_ids"] = more["position_ids"][:, start:]
            steps.append(model(IDS[:, start:end], **{CACHE: cache}, use_cache=True, **more).logits)
    real = torch.ones_like(IDS).bool() if mask is None else mask.bool()
    # float32 products of 32 features, three layers deep
    bound = 32 * 3 * 2**-23 * whole.abs().max().item()
    torch.testing.assert_close(torch.cat(steps, dim=1)[real], whole[real], rtol=0, atol=bound)


def _places(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("positions", ["last", [-1]], ids=str)
def test_what_is_counted_from_the_end_is_refused_after_cached_tokens(positions: Any) -> None:
    model = tiny_model("llama")
    with vector_of(model).apply(model, positions=positions), torch.no_grad():
        cache = cache_of(model(IDS, use_cache=True))
        with pytest.raises(InterventionError, match=r"another column in this pass, after 7 cached tokens"):
            model(IDS[:, :1], **{CACHE: cache})


@pytest.mark.parametrize("positions", ["all", range(6, 10_000)], ids=str)
@pytest.mark.parametrize("architecture", DEFAULT)
def test_generation_is_the_same_with_a_cache_and_without(architecture: str, positions: Any) -> None:
    model = tiny_model(architecture)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    given = {"input_ids": IDS, "attention_mask": LEFT}
    plain = model.generate(**given, **settings)
    with vector_of(model).apply(model, 4.0, positions):
        cached, whole = (model.generate(**given, **settings, use_cache=use) for use in (True, False))
    assert torch.equal(cached, whole)
    assert not torch.equal(cached, plain)


def test_a_cache_that_was_filled_otherwise_is_told() -> None:
    model = tiny_model("llama")
    vector = vector_of(model)

    def step(cache: Any) -> None:
        with torch.no_grad():
            model(IDS[:, :1], **{CACHE: copy.deepcopy(cache)})

    with torch.no_grad():
        unsteered = cache_of(model(IDS))
        with vector.apply(model):
            steered = cache_of(model(IDS))
            step(steered)
            with pytest.warns(StaleCacheWarning, match="filled without the freeze"):
                step(unsteered)
        for other in ({"strength": 2.0}, {"positions": [0]}):
            with vector.apply(model, on_stale_cache="error", **other), pytest.raises(InterventionError, match="cache"):
                step(steered)
        with vector.apply(model, on_stale_cache="ignore"):
            step(unsteered)
        with vector.apply(model), vector.apply(model, 0.0):
            step(steered)
