"""The tap sees what attention consumed, changes nothing, and says when it cannot see."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from by_heart import BY_HEART
from torch.nn import functional as F
from transformers import PreTrainedModel

from pytest_circuitfreeze.engines import FreezeCore
from pytest_circuitfreeze.models import tiny_model
from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.judge.judged_sites import CannotJudge
from pytest_circuitfreeze.suites.judge.observed_passes import (
    attention_implementation,
    observe,
    pads_under_eager,
    run_pass,
)
from pytest_circuitfreeze.suites.judge.site_lookup import sites
from pytest_circuitfreeze.suites.judge.visible_state import changes, visible_state

IDS = torch.tensor([[7, 3, 11, 5], [4, 19, 6, 23]])
BATCH = Batch(IDS, torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", BY_HEART)
def test_looking_changes_nothing(name: str, attn: str) -> None:
    model = tiny_model(name)
    with attention_implementation(model, attn), torch.no_grad():
        want = model(**BATCH.arguments(model)).logits
    before = visible_state(model)
    got = run_pass(FreezeCore(), model, None, BATCH, attn=attn).logits
    assert torch.equal(got, want)
    assert not changes(before, visible_state(model))


@pytest.mark.parametrize("name", BY_HEART)
def test_attention_implementation_takes_effect_and_is_put_back(name: str) -> None:
    model = tiny_model(name)
    calls: list[Any] = []

    class Count(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(func)
            return func(*args, **(kwargs or {}))

    with attention_implementation(model, "eager"), Count():
        model(IDS)
    assert F.scaled_dot_product_attention not in calls
    with Count():
        model(IDS)
    assert F.scaled_dot_product_attention in calls


def test_gradients_reach_the_probes_and_the_input() -> None:
    model = tiny_model("llama_gqa")
    found = observe(model, model, BATCH, sites(model), gradients=True)
    found.logits.sum().backward()
    for seen in found.layers.values():
        assert seen.hidden.grad is not None
        for role, used in seen.qkv.items():
            assert seen.probes[role].grad.shape == used.shape


def test_attention_elsewhere_is_said_to_be_out_of_sight(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt2")
    own = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kwargs: torch.zeros_like(args[0]))
    with pytest.raises(CannotJudge, match=r"attention of layers .* did not call scaled_dot_product_attention"):
        run_pass(FreezeCore(), model, None, BATCH)
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *args, **kwargs: own(*args, **kwargs) + own(*args, **kwargs)
    )
    with pytest.raises(CannotJudge, match="attention ran twice in layer 0"):
        run_pass(FreezeCore(), model, None, BATCH)


@pytest.mark.parametrize("name", BY_HEART)
def test_eager_is_shown_padding_where_it_stays_finite(name: str) -> None:
    model = tiny_model(name)
    assert pads_under_eager(model)
    assert run_pass(FreezeCore(), model, None, BATCH, attn="eager").logits.isfinite().all()
    assert not pads_under_eager(tiny_model(name, dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "trace"),
    [
        (lambda model: setattr(model.model.layers[0].self_attn, "left", 1), "model.layers.0.self_attn.left is new"),
        (lambda model: delattr(model.model.layers[0].self_attn, "scaling"), "self_attn.scaling is gone"),
        (lambda model: setattr(model.model.layers[0].self_attn, "scaling", 2.0), "self_attn.scaling changed"),
        (lambda model: model.lm_head.register_forward_hook(lambda *_: None), "_forward_hooks.* is new"),
        (lambda model: model.lm_head.weight.data.mul_(2), "weight.* changed"),
        (lambda model: model.lm_head.weight.requires_grad_(False), "weight.* changed"),
        (lambda model: model.lm_head.register_buffer("left", torch.zeros(1)), "_buffers.left. is new"),
        (lambda model: setattr(model.lm_head, "forward", lambda x: x), "lm_head.forward is new"),
        (lambda model: model.lm_head.train(), "lm_head.training changed"),
        (lambda model: setattr(model.config, "num_attention_heads", 1), "its values changed"),
    ],
)
def test_traces_are_seen(change: Any, trace: str) -> None:
    model: PreTrainedModel = tiny_model("llama")
    before = visible_state(model)
    change(model)
    found = "; ".join(changes(before, visible_state(model)))
    assert re.search(trace, found)
