"""What a freeze knows of the running pass: padding, cached columns, recomputation."""

from __future__ import annotations

import inspect

import pytest
import torch
from cache_names import CACHE, cache_of

from freeze_core import AttentionCircuitFreezer, InterventionConfig, InterventionError
from pytest_circuitfreeze.models import tiny_model

FREEZER = AttentionCircuitFreezer()
PASS_STATISTICS = [{"freeze_type": "mean"}, {"freeze_type": "noise"}]


def masks():
    left, right = torch.ones(2, 7, dtype=torch.long), torch.ones(2, 7, dtype=torch.long)
    left[0, :3] = 0
    right[1, 5:] = 0
    return left, right


@pytest.mark.parametrize("entry", ["whole", "base"])
@pytest.mark.parametrize("how", ["by name", "by position"])
def test_padding_plays_no_part_however_the_model_is_entered(model, ids, entry, how):
    """The replacement does not move when the tokens under the padding do."""
    mask = masks()[1]
    other = torch.where(mask.bool(), ids, (ids + 1) % 97)
    entered = model if entry == "whole" else model.base_model
    names = list(inspect.signature(entered.forward).parameters)

    def run(tokens):
        if how == "by name":
            out = entered(input_ids=tokens, attention_mask=mask)
        else:
            by_name = {"input_ids": tokens, "attention_mask": mask}
            out = entered(*(by_name.get(name) for name in names[: names.index("attention_mask") + 1]))
        return out[0][mask.bool()]

    config = InterventionConfig([0], freeze_type="mean", circuit="ov")
    with torch.no_grad(), FREEZER.freeze_circuits(model, config):
        assert torch.equal(run(ids), run(other))


@pytest.mark.parametrize("kwargs", PASS_STATISTICS)
def test_statistics_of_a_cached_step_are_refused(model, ids, kwargs):
    with FREEZER.freeze_circuits(model, InterventionConfig(**kwargs)), torch.no_grad():
        cache = cache_of(model(ids, use_cache=True))
        with pytest.raises(InterventionError, match="after 7 cached tokens"):
            model(ids[:, :1], **{CACHE: cache})


@pytest.mark.parametrize("kwargs", PASS_STATISTICS)
def test_statistics_under_a_mask_that_does_not_tell_padding_are_refused(model, ids, kwargs):
    mask = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    frozen = FREEZER.freeze_circuits(model, InterventionConfig(**kwargs))
    with frozen, torch.no_grad(), pytest.raises(InterventionError, match=r"attention_mask is \[2, 1, 7, 7\]"):
        model(ids, attention_mask=mask)


def test_a_layer_run_by_itself_is_refused_where_the_pass_matters(ids):
    model = tiny_model("gpt2")
    hidden = torch.randn(2, 7, 32)
    frozen = FREEZER.freeze_circuits(model, InterventionConfig(freeze_type="mean"))
    with frozen, pytest.raises(InterventionError, match="the layer was run by itself"):
        model.transformer.h[0](hidden)
    with FREEZER.freeze_circuits(model, InterventionConfig()):
        model.transformer.h[0](hidden)


@pytest.mark.parametrize("scope", ["group", "head"])
@pytest.mark.parametrize("kwargs", [{"freeze_type": "zero"}, {"freeze_type": "noise", "noise_std": 0.5}])
def test_cached_decoding_equals_one_pass(model, ids, scope, kwargs):
    with FREEZER.freeze_circuits(model, InterventionConfig([0, 1], [1], kv_scope=scope, **kwargs)), torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache = cache_of(model(ids[:, :4], use_cache=True))
        steps = [model(ids[:, t : t + 1], **{CACHE: cache}, use_cache=True).logits for t in range(4, 7)]
    # float32 products of 32 features, three layers deep
    torch.testing.assert_close(
        torch.cat(steps, dim=1), whole[:, 4:], rtol=0, atol=32 * 3 * 2**-23 * whole.abs().max().item()
    )


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kwargs", [*PASS_STATISTICS, {"freeze_type": "noise", "noise_std": 0.5}])
def test_recomputation_happens_in_the_pass_it_came_from(kwargs, reentrant, ids):
    """Two checkpointed passes with different padding are outstanding when the first is run again."""
    model = tiny_model("llama_gqa").train()
    model.enable_input_require_grads()

    def gradients():
        model.zero_grad()
        sum(model(ids, attention_mask=mask).logits.square().mean() for mask in masks()).backward()
        return [parameter.grad for parameter in model.parameters()]

    config = InterventionConfig([0, 2], [1], backward_mode="ste", kv_scope="head", **kwargs)
    with FREEZER.freeze_circuits(model, config):
        plain = gradients()
        model._set_gradient_checkpointing(
            True, lambda *args, **options: torch.utils.checkpoint.checkpoint(*args, use_reentrant=reentrant, **options)
        )
        functions = [vars(layer)["_gradient_checkpointing_func"] for layer in model.model.layers]
        assert all(torch.equal(one, other) for one, other in zip(plain, gradients(), strict=True))
    assert functions == [vars(layer)["_gradient_checkpointing_func"] for layer in model.model.layers]
