"""A layer that runs again in the backward pass is frozen as it was, or an error says what to do."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch.distributed._composable import checkpoint as composable_checkpoint
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, CheckpointWrapper
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutput

from freeze_core import AttentionCircuitFreezer, FreezeNotInForceError, InterventionConfig, InterventionError
from freeze_core.freezing import recomputation
from pytest_circuitfreeze.models import tiny_model

# A checkpoint within a reentrant one has inputs without gradients at first, of which torch warns.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
FREEZER = AttentionCircuitFreezer()
IDS = torch.arange(14).view(2, 7) * 5 % 97
MASKS = [torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7]), torch.ones(2, 7, dtype=torch.long)]


class OtherCheckpoint(torch.autograd.Function):
    """A checkpoint of another library, as fairscale, DeepSpeed and Megatron have one."""

    @staticmethod
    def forward(ctx, run_function, hidden, kwargs):
        ctx.run_function, ctx.kwargs = run_function, kwargs
        ctx.save_for_backward(hidden)
        return run_function(hidden, **kwargs)

    @staticmethod
    def backward(ctx, grad):
        hidden = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.run_function(hidden, **ctx.kwargs)
        torch.autograd.backward(output, grad)
        return None, hidden.grad, None


class UnknownCheckpoint(OtherCheckpoint):
    """One that keeps what it calls again to itself while it runs."""

    @staticmethod
    def forward(ctx, run_function, hidden, kwargs):
        output = run_function(hidden, **kwargs)
        ctx.run_function, ctx.kwargs = run_function, kwargs
        ctx.save_for_backward(hidden)
        return output


def wrapped(module, reentrant):
    return CheckpointWrapper(module, CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT)


def around_layers(model, reentrant):
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = wrapped(layer, reentrant)


def around_attention(model, reentrant):
    for layer in model.model.layers:
        layer.self_attn = wrapped(layer.self_attn, reentrant)


def around_the_model(model, reentrant):
    run = model.forward
    model.forward = lambda inputs_embeds, **kwargs: CausalLMOutput(
        logits=checkpoint(
            lambda embedded: run(inputs_embeds=embedded, **kwargs).logits, inputs_embeds, use_reentrant=reentrant
        )
    )


def around_layers_and_the_model(model, reentrant):
    around_layers(model, reentrant)
    around_the_model(model, reentrant)


def by_hand(model, reentrant):
    for layer in model.model.layers:
        run = layer.forward
        layer.forward = lambda hidden, run=run, **kwargs: checkpoint(
            lambda hidden: run(hidden, **kwargs), hidden, use_reentrant=reentrant
        )


def by_hand_around_projections(model, reentrant):
    for layer in model.model.layers:
        for module in (layer.self_attn.v_proj, layer.self_attn.o_proj):
            module.forward = partial(checkpoint, module.forward, use_reentrant=reentrant)


def by_hand_with(function, model, reentrant):
    for layer in model.model.layers:
        run = layer.forward
        layer.forward = lambda hidden, run=run, **kwargs: function.apply(run, hidden, kwargs)


def by_the_composable_api(model, reentrant):
    for layer in model.model.layers:
        composable_checkpoint(layer)


def by_transformers(model, reentrant):
    model._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=reentrant))


WAYS = {
    "around layers": around_layers,
    "around attention": around_attention,
    "around the model": around_the_model,
    "around layers and the model": around_layers_and_the_model,
    "by hand": by_hand,
    "by hand around projections": by_hand_around_projections,
    "by transformers": by_transformers,
}
BOTH = [(way, reentrant) for way in WAYS for reentrant in (True, False)]
ALONE = {
    "by another library": partial(by_hand_with, OtherCheckpoint),
    "by the composable API": by_the_composable_api,
}
EVERY = [*BOTH, ("by another library", True), ("by the composable API", False)]
FROZEN_INSIDE = [case for case in EVERY if case[0] != "by hand around projections"]
"""Those in which what is frozen runs, not only the projection beneath a freeze."""


def build(way=None, reentrant=True):
    model = tiny_model("llama_gqa").train()
    model.enable_input_require_grads()
    if way:
        {**WAYS, **ALONE}[way](model, reentrant)
    return model


def config(mode="ste", **fields):
    return InterventionConfig([0, 2], [1], "both", "mean", mode, kv_scope="head", **fields)


def losses(model):
    """Of two passes under different masks, so that it matters which of them is run again."""
    embedded = [(model.get_input_embeddings()(IDS), mask) for mask in MASKS]
    passes = [model(inputs_embeds=one, attention_mask=mask, use_cache=False) for one, mask in embedded]
    return sum(one.logits[:, 3:].square().mean() for one in passes)


def gradients(model, loss):
    loss.backward()
    return [parameter.grad for parameter in model.parameters()]


def frozen_gradients(model, config):
    with FREEZER.freeze_circuits(model, config):
        return gradients(model, losses(model))


@pytest.fixture(scope="module")
def expected():
    return {mode: frozen_gradients(build(), config(mode)) for mode in ("stopgrad", "ste", "circuit_ste")}


@pytest.mark.parametrize("mode", ["stopgrad", "ste", "circuit_ste"])
@pytest.mark.parametrize(("way", "reentrant"), EVERY)
def test_each_pass_runs_again_under_its_own_freeze_and_mask(way, reentrant, mode, expected):
    found = frozen_gradients(build(way, reentrant), config(mode))
    assert all(torch.equal(one, other) for one, other in zip(found, expected[mode], strict=True))


@pytest.mark.parametrize(("way", "reentrant"), FROZEN_INSIDE)
@pytest.mark.parametrize("later", [None, config(strength=0.5)])
def test_running_again_under_other_freezes_is_an_error(way, reentrant, later):
    model = build(way, reentrant)
    with FREEZER.freeze_circuits(model, config()):
        loss = losses(model)
    frozen = FREEZER.freeze_circuits(model, later) if later else nullcontext()
    with frozen, pytest.raises(FreezeNotInForceError, match="under other freezes than it first ran under: call backw"):
        loss.backward()
    model.zero_grad()
    found = frozen_gradients(model, config())
    assert all(torch.equal(one, other) for one, other in zip(found, frozen_gradients(build(), config()), strict=True))


@pytest.mark.parametrize(("way", "reentrant"), [("around layers", False), ("around the model", True)])
def test_the_same_freeze_installed_anew_is_the_same(way, reentrant, expected):
    model = build(way, reentrant)
    with FREEZER.freeze_circuits(model, config()):
        loss = losses(model)
    with FREEZER.freeze_circuits(model, config()):
        found = gradients(model, loss)
    assert all(torch.equal(one, other) for one, other in zip(found, expected["ste"], strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_projection_that_runs_again_beneath_the_freeze_is_the_same_without_it(reentrant, expected):
    model = build("by hand around projections", reentrant)
    with FREEZER.freeze_circuits(model, config()):
        loss = losses(model)
    assert all(torch.equal(*pair) for pair in zip(gradients(model, loss), expected["ste"], strict=True))


@pytest.mark.parametrize(("way", "reentrant"), FROZEN_INSIDE)
def test_an_unfrozen_pass_that_runs_again_under_a_freeze_is_an_error(way, reentrant):
    model = build(way, reentrant)
    loss = losses(model)
    with (
        FREEZER.freeze_circuits(model, config()),
        pytest.raises(FreezeNotInForceError, match="its pass ran without this freeze: call backward before"),
    ):
        loss.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_parameters_that_learn_nothing_before_the_freeze_do_not_hide_it(reentrant):
    """Nothing in attention has a gradient there, so that torch itself would see no difference when it runs again."""
    model = build().requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp.down_proj.requires_grad_(True)
    model.disable_input_require_grads()
    hidden = torch.ones(1, requires_grad=True)
    run = model.model.layers[0].forward
    model.model.layers[0].forward = lambda states, **kwargs: checkpoint(
        lambda states, _: run(states, **kwargs), states, hidden, use_reentrant=reentrant
    )
    with FREEZER.freeze_circuits(model, InterventionConfig([0], [1], "v")):
        loss = losses(model)
    with pytest.raises(FreezeNotInForceError, match="under other freezes"):
        loss.backward()


# All from inside torch's own compiler.
@pytest.mark.filterwarnings(
    "ignore:.torch.jit:DeprecationWarning", "ignore:.*should not be instantiated", "ignore:The .grad attribute"
)
@pytest.mark.parametrize(("training", "reentrant"), [(True, True), (False, True)])
def test_a_compiled_layer_runs_again_under_its_own_freeze(training, reentrant, expected):
    torch.compiler.reset()
    model = build()
    for layer in model.model.layers:
        layer.compile(backend="eager")
    around_layers(model, reentrant)
    model.train(training)
    found = frozen_gradients(model, config())
    assert all(torch.equal(one, other) for one, other in zip(found, expected["ste"], strict=True))
    with FREEZER.freeze_circuits(model, config()):
        loss = losses(model)
    with pytest.raises(FreezeNotInForceError, match="under other freezes"):
        loss.backward()
    torch.compiler.reset()


def test_a_layer_run_by_itself_in_a_checkpoint_is_followed_too():
    model = build()
    layer = model.model.layers[0]
    hidden = torch.randn(1, 4, 32, requires_grad=True)
    angles = model.model.rotary_emb(hidden, torch.arange(4)[None])
    run = lambda hidden: layer(hidden, position_embeddings=angles)  # noqa: E731
    for reentrant in (True, False):
        with FREEZER.freeze_circuits(model, InterventionConfig([0], [1], "v")):
            (expected,) = torch.autograd.grad(run(hidden).square().sum(), hidden)
            hidden.grad = None
            checkpoint(run, hidden, use_reentrant=reentrant).square().sum().backward()
            assert torch.equal(hidden.grad, expected)
            loss = checkpoint(run, hidden, use_reentrant=reentrant).square().sum()
        with pytest.raises(FreezeNotInForceError, match="under other freezes"):
            loss.backward()


def test_a_checkpoint_whose_call_is_unknown_is_refused_while_it_first_runs():
    model = build()
    by_hand_with(UnknownCheckpoint, model, True)
    with FREEZER.freeze_circuits(model, config()):
        with pytest.raises(FreezeNotInForceError, match=r"function UnknownCheckpoint, .* use torch.utils.checkpoint"):
            losses(model)
        model.eval().requires_grad_(False)
        model.disable_input_require_grads()
        losses(model)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_projection_checkpointed_alone_is_refused_where_attention_runs_twice(reentrant):
    model = build()
    with FREEZER.freeze_circuits(model, config("circuit_ste")):
        losses(model)
        attention = model.model.layers[0].self_attn
        run = attention.v_proj.forward
        attention.v_proj._call_impl = partial(checkpoint, run, use_reentrant=reentrant)
        with pytest.raises(InterventionError, match="checkpoint the whole attention, or its layer"):
            losses(model)
        del attention.v_proj._call_impl


def test_hooks_for_saved_tensors_stay_as_they_were():
    model, packed = build("around layers", False), []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(1) or x, lambda x: x),
        FREEZER.freeze_circuits(model, config()),
    ):
        before = len(packed)
        losses(model)
        assert len(packed) > before
        before = len(packed)
        torch.ones(2, requires_grad=True).exp()
        assert len(packed) == before + 1


@pytest.mark.parametrize("mode", ["circuit_ste"])
def test_hooks_of_others_see_the_frozen_run_last_and_gradients_in_the_run_before(mode, ids):
    """Attention runs twice while gradients are kept: as it is without the freeze, for the gradient, then frozen."""
    model, seen = tiny_model("llama"), []
    model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    with FREEZER.freeze_circuits(model, InterventionConfig([0], [1], "v", backward_mode=mode)):
        loss = model(ids).logits.square().mean()
        unfrozen, frozen = seen
        assert torch.equal(frozen[..., 8:16], torch.zeros_like(frozen[..., 8:16]))
        assert torch.equal(frozen[..., :8], unfrozen[..., :8])
        gradient, none = torch.autograd.grad(loss, [unfrozen, frozen], allow_unused=True)
        assert none is None
        assert bool(gradient[..., 8:16].any())
        with torch.no_grad():
            model(ids)
        assert len(seen) == 3


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_are_found_where_torch_shows_neither_hooks_nor_calls(reentrant, monkeypatch):
    # Torch 2.6 does not show the hooks for saved tensors; from 2.15 on functions are not called from Python.
    monkeypatch.setattr(recomputation, "SHOWS_HOOKS", False)
    monkeypatch.setattr(recomputation, "APPLY", None)
    model = tiny_model("llama")
    layer = model.model.layers[1]
    own = layer.forward
    layer.forward = lambda x, **options: checkpoint(partial(own, **options), x, use_reentrant=reentrant)
    with AttentionCircuitFreezer().freeze_circuits(model, InterventionConfig([1], [1], "ov")):
        loss = model(torch.arange(1, 7)[None]).logits.sum()
    with pytest.raises(FreezeNotInForceError):
        loss.backward()
