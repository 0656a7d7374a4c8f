"""Projections that are compiled or wrapped, and freezes that are installed in another mode than they are used in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from freeze_core import AttentionCircuitFreezer, InterventionConfig, UnsupportedModelError
from pytest_circuitfreeze.models import tiny_model

FREEZER = AttentionCircuitFreezer()


class Around(nn.Module):
    """A module around one projection that says nothing of its own."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class Several(nn.Module):
    """A module around a projection and something else, in an order that only its forward knows."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.other = inner, nn.Identity()

    def forward(self, x):
        return self.other(self.inner(x))


WRAPPERS = {
    "compiled": lambda one: torch.compile(one, backend="eager"),
    "Sequential": nn.Sequential,
    "Sequential with dropout": lambda one: nn.Sequential(nn.Dropout(0.0), one, nn.Dropout(0.0)),
    "Sequential in a Sequential": lambda one: nn.Sequential(nn.Sequential(one)),
    "compiled Sequential": lambda one: torch.compile(nn.Sequential(one), backend="eager"),
    "module around it": Around,
}

PROJECTIONS = {"llama_gqa": ["q_proj", "k_proj", "v_proj", "o_proj"], "gpt2": ["c_attn", "c_proj"]}


def attentions(model):
    return [module for name, module in model.named_modules() if name.endswith(("self_attn", ".attn"))]


@pytest.mark.parametrize("scope", ["group", "head"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", PROJECTIONS)
def test_wrapped_projections_are_frozen_as_bare_ones(name, wrapper, scope, ids):
    torch._dynamo.reset()
    bare, model = tiny_model(name), tiny_model(name)
    for attention in attentions(model):
        for projection in PROJECTIONS[name]:
            setattr(attention, projection, WRAPPERS[wrapper](getattr(attention, projection)))
    assert FREEZER.get_model_config(model) == FREEZER.get_model_config(bare)
    with torch.no_grad():
        clean = model(ids, use_cache=False).logits
        for circuit in ("both", "qk"):
            config = InterventionConfig([0, 1], [1], circuit, "mean", kv_scope=scope)
            with FREEZER.freeze_circuits(bare, config):
                expected = bare(ids, use_cache=False).logits
            with FREEZER.freeze_circuits(model, config):
                assert torch.equal(model(ids, use_cache=False).logits, expected)
            assert torch.equal(model(ids, use_cache=False).logits, clean)
        recorded, wanted = (FREEZER.record(one, ids) for one in (model, bare))
    assert all(torch.equal(getattr(recorded[0], role), getattr(wanted[0], role)) for role in "qkvz")


@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_wrapper_that_does_not_say_its_size_is_refused_by_name(name):
    for projection in PROJECTIONS[name]:
        model = tiny_model(name)
        for attention in attentions(model):
            setattr(attention, projection, Several(getattr(attention, projection)))
        with pytest.raises(UnsupportedModelError, match="is a Several, which does not say how many features"):
            FREEZER.freeze_circuits(model, InterventionConfig([0]))


def inference_mode():
    return torch.inference_mode()


def meta():
    return torch.device("meta")


MODES = {"inference mode": inference_mode, "meta device": meta, "no_grad": torch.no_grad}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backward", ["stopgrad", "ste", "circuit_ste"])
@pytest.mark.parametrize("freeze_type", ["zero", "mean", "noise", "noise_std", "reference", "resample", "statistics"])
def test_a_freeze_does_not_depend_on_the_mode_it_was_installed_in(freeze_type, backward, mode, ids):
    """Nor on the mode of its first pass, nor on that in which another freeze of the layer is removed."""
    model = tiny_model("llama_gqa")
    fields = {"freeze_type": freeze_type, "backward_mode": backward, "strength": 0.5, "kv_scope": "head"}
    with MODES[mode]() if mode != "meta device" else torch.no_grad():
        recording, statistics = FREEZER.record(model, ids.flip(0)), FREEZER.calibrate(model, [ids], progress=False)
    if freeze_type == "reference":
        fields["reference"] = recording
    elif freeze_type == "noise_std":
        fields |= {"freeze_type": "noise", "noise_std": 1.0}
    elif freeze_type == "statistics":
        fields |= {"freeze_type": "noise", "statistics": statistics}
    config = InterventionConfig([0, 1], [1], **fields)

    def grads():
        model.zero_grad()
        logits = model(ids, use_cache=False).logits
        logits.square().sum().backward()
        return [logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    with FREEZER.freeze_circuits(model, config):
        expected = grads()
    with MODES[mode]():
        first = FREEZER.freeze_circuits(model, config)
        second = FREEZER.freeze_circuits(model, InterventionConfig([0], [2], "v"))
        second.remove()
    if mode == "inference mode":
        with torch.inference_mode():
            model(ids, use_cache=False)
    found = grads()
    first.remove()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_vector_does_not_depend_on_the_mode_it_was_added_in(ids):
    from steered import vector_of

    model = tiny_model("llama")
    vector = vector_of(model)
    for mode in MODES.values():
        with mode():
            steered = vector.apply(model, positions="last")
        model(ids, use_cache=False).logits.sum().backward()
        steered.remove()
