"""Forwards that somebody wraps, patches or copies while they are frozen: removal restores the model or raises."""

from __future__ import annotations

import copy
import functools
import itertools
from types import MethodType

import pytest
import torch
from torch import nn

from freeze_core import (
    AttentionCircuitFreezer,
    CircuitFreezeError,
    FreezeNotInForceError,
    InterventionConfig,
    freeze_ov_circuit,
)
from freeze_core.forward_patch import PATCHES
from pytest_circuitfreeze.models import tiny_model
from pytest_circuitfreeze.shrinking import tiny_of_type

FREEZER = AttentionCircuitFreezer()
CONFIG = InterventionConfig([0, 1], [1], "both", "mean", backward_mode="circuit_ste", kv_scope="head")

TARGETS = {
    "projection": "model.layers.0.self_attn.v_proj",
    "output projection": "model.layers.0.self_attn.o_proj",
    "attention": "model.layers.0.self_attn",
    "stack": "model",
}


class Calls:
    """A callable that is neither a function nor a method."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def with_wraps(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


WRAPPERS = {
    "lambda": lambda module, old: lambda *args, **kwargs: old(*args, **kwargs),
    "method": lambda module, old: MethodType(lambda self, *args, **kwargs: old(*args, **kwargs), module),
    "partial": lambda module, old: functools.partial(old),
    "callable object": lambda module, old: Calls(old),
    "functools.wraps": lambda module, old: with_wraps(old),
    "method with functools.wraps": lambda module, old: MethodType(
        functools.wraps(old)(lambda self, *args, **kwargs: old(*args, **kwargs)), module
    ),
    "method around the function": lambda module, old: MethodType(with_wraps(old.__func__), module),
    "two wrappers": lambda module, old: with_wraps(Calls(old)),
}


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def attributes(model):
    return {name: sorted(vars(module)) for name, module in model.named_modules()}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("target", TARGETS)
def test_removal_beneath_a_wrapper_raises_until_the_wrapper_is_taken_off(target, wrapper, ids):
    model = tiny_model("llama_gqa")
    clean, before = logits(model, ids), attributes(model)
    module = model.get_submodule(TARGETS[target])
    seen = []

    def freeze_and_wrap():
        with FREEZER.freeze_circuits(model, CONFIG):
            seen.extend([logits(model, ids), module.forward])
            module.forward = WRAPPERS[wrapper](module, module.forward)
            assert torch.equal(logits(model, ids), seen[0])

    with pytest.raises(CircuitFreezeError, match=r"was replaced again, by .*put back the forward") as refused:
        freeze_and_wrap()
    frozen, old = seen
    assert torch.equal(logits(model, ids), frozen)
    module.forward = old
    assert torch.equal(logits(model, ids), frozen)
    refused.value.frozen.remove()
    assert torch.equal(logits(model, ids), clean)
    assert attributes(model) == before


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("target", TARGETS)
def test_a_wrapper_that_is_deleted_with_the_forward_beneath_it_leaves_the_unfrozen_model(target, wrapper, ids):
    model = tiny_model("llama_gqa")
    clean, before = logits(model, ids), attributes(model)
    module = model.get_submodule(TARGETS[target])
    frozen = FREEZER.freeze_circuits(model, CONFIG)
    module.forward = WRAPPERS[wrapper](module, module.forward)
    with pytest.raises(CircuitFreezeError, match=r"del module\.forward"):
        frozen.remove()
    del module.forward
    frozen.remove()
    assert torch.equal(logits(model, ids), clean)
    assert attributes(model) == before


ENDS = {
    "deleted": lambda module, own: vars(module).pop("forward"),
    "put back": lambda module, own: setattr(module, "forward", own),
    "put back as a method made anew": lambda module, own: setattr(
        module, "forward", MethodType(type(module).forward, module)
    ),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("target", TARGETS)
def test_a_wrapper_from_before_the_freeze_that_is_taken_off_meanwhile(target, end, ids):
    """The freeze goes with it: a pass says so where that matters, and removal puts nothing back."""
    model = tiny_model("llama_gqa")
    clean = logits(model, ids)
    module = model.get_submodule(TARGETS[target])
    own = module.forward
    module.forward = wrapper = with_wraps(own)
    frozen = FREEZER.freeze_circuits(model, CONFIG)
    ENDS[end](module, own)
    with pytest.raises(CircuitFreezeError):  # the stack alone tells where padding is
        logits(model, ids)
    frozen.remove()
    assert module.forward is not wrapper
    assert torch.equal(logits(model, ids), clean)
    vars(module).pop("forward", None)
    assert attributes(model) == attributes(tiny_model("llama_gqa"))


def test_a_forward_that_is_bound_to_the_module_anew_is_still_the_frozen_one(ids):
    """As accelerate does where it takes off what it put on."""
    model = tiny_model("llama_gqa")
    clean = logits(model, ids)
    for target in TARGETS.values():
        module = model.get_submodule(target)
        with FREEZER.freeze_circuits(model, CONFIG):
            frozen = logits(model, ids)
            module.forward = MethodType(module.forward.__func__, module)
            assert torch.equal(logits(model, ids), frozen)
        assert torch.equal(logits(model, ids), clean)
        assert "forward" not in vars(module)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("order", ["on inside", "off inside", "on and off inside", "around"])
def test_a_patch_of_the_class_acts_whenever_it_is_on(target, order, ids, monkeypatch):
    model = tiny_model("llama_gqa")
    module = model.get_submodule(TARGETS[target])
    clean, before = logits(model, ids), attributes(model)
    cls, own, calls = type(module), type(module).forward, []

    def patched(self, *args, **kwargs):
        calls.append(self)
        return own(self, *args, **kwargs)

    with FREEZER.freeze_circuits(model, CONFIG):
        expected = logits(model, ids)
    if order in ("off inside", "around"):
        monkeypatch.setattr(cls, "forward", patched)
    with FREEZER.freeze_circuits(model, CONFIG):
        for on in {"on inside": [True], "off inside": [False], "on and off inside": [True, False]}.get(order, [True]):
            monkeypatch.setattr(cls, "forward", patched if on else own)
            calls.clear()
            assert torch.equal(logits(model, ids), expected)
            assert (module in calls) == on
    calls.clear()
    assert torch.equal(logits(model, ids), clean)
    assert (module in calls) == (order in ("on inside", "around"))
    assert attributes(model) == before


def test_a_patch_of_the_class_that_keeps_the_frozen_forward_reaches_the_unfrozen_one_afterwards(ids, monkeypatch):
    model = tiny_model("llama_gqa")
    clean = logits(model, ids)
    with FREEZER.freeze_circuits(model, CONFIG):
        kept = model.model.forward
        monkeypatch.setattr(type(model.model), "forward", lambda self, *args, **kwargs: kept(*args, **kwargs))
        with pytest.raises(CircuitFreezeError, match="running already"):
            logits(model, ids)
    assert torch.equal(logits(model, ids), clean)


def steps_of_hooks():
    """Orders in which accelerate's hook goes on (`a`) and off (`r`) around an install (`f`) and a removal (`u`)."""
    for length in range(2, 6):
        for steps in itertools.product("far", repeat=length):
            if steps.count("f") == 1:
                yield "".join(steps) + "u"


@pytest.mark.parametrize("target", TARGETS)
def test_hooks_of_accelerate_go_on_and_off_in_any_order(target, ids):
    hooks = pytest.importorskip("accelerate.hooks", reason="the extra 'conditions' is not installed")
    clean = logits(tiny_model("llama_gqa"), ids)
    orders = list(steps_of_hooks()) if target == "projection" else ["afaru", "faru", "farau", "afrau", "faaru", "faru"]
    for order in orders:
        model = tiny_model("llama_gqa")
        module = model.get_submodule(TARGETS[target])
        for step in order:
            if step == "f":
                frozen = FREEZER.freeze_circuits(model, CONFIG)
            elif step == "a":
                hooks.add_hook_to_module(module, hooks.ModelHook())
            elif step == "r":
                hooks.remove_hook_from_module(module)
        frozen.remove()
        assert torch.equal(logits(model, ids), clean), order
        hooks.remove_hook_from_module(module)
        assert torch.equal(logits(model, ids), clean), order
        assert PATCHES not in vars(module), order


def test_mixed_precision_of_accelerate_goes_on_top_of_the_freeze_of_a_base_model(ids):
    """The stack itself is prepared: accelerate takes the function of its forward and binds it to the model anew."""
    accelerate = pytest.importorskip("accelerate", reason="the extra 'conditions' is not installed")
    model = tiny_model("llama_gqa").model
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    with torch.no_grad():
        clean = model(ids)[0]
        frozen = FREEZER.freeze_circuits(model, InterventionConfig([0], [1], "v"))
        expected = model(ids)[0]
        prepared = accelerator.prepare(model)
        rounded = prepared(ids)[0]
        assert not torch.equal(rounded, expected)
        torch.testing.assert_close(rounded, expected, rtol=0, atol=0.1 * float((expected - clean).abs().max()))
        with pytest.raises(CircuitFreezeError, match=r"LlamaModel was replaced again, by convert_outputs_to_fp32"):
            frozen.remove()
        accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        assert torch.equal(model(ids)[0], expected)
        frozen.remove()
        assert torch.equal(model(ids)[0], clean)
    assert "forward" not in vars(model)


def test_a_wrapper_of_the_model_around_the_stack_raises_too(ids):
    model = tiny_of_type("gemma3", attn="eager")
    outer = model.model
    clean = logits(model, ids)
    frozen = FREEZER.freeze_circuits(model, InterventionConfig([0], [1]))
    expected = logits(model, ids)
    for wrapper in WRAPPERS.values():
        old = outer.forward
        outer.forward = wrapper(outer, old)
        assert torch.equal(logits(model, ids), expected)
        with pytest.raises(CircuitFreezeError, match="Gemma3Model was replaced again"):
            frozen.remove()
        outer.forward = old
    frozen.remove()
    assert torch.equal(logits(model, ids), clean)
    assert "forward" not in vars(outer)


def test_a_stack_that_is_wrapped_takes_no_second_freeze_on_another_layer(ids):
    """A second tracker on top would mark the caches of the first."""
    model = tiny_model("llama")
    clean = logits(model, ids)
    frozen = FREEZER.freeze_circuits(model, InterventionConfig([0], [1]))
    old = model.model.forward
    model.model.forward = with_wraps(old)
    with pytest.raises(CircuitFreezeError, match="LlamaModel was replaced again"):
        FREEZER.freeze_circuits(model, InterventionConfig([1], [1]))
    model.model.forward = old
    frozen.remove()
    assert torch.equal(logits(model, ids), clean)


def test_a_stack_that_lost_its_tracker_gets_another_one_with_the_next_freeze(ids):
    model = tiny_model("llama")
    clean = logits(model, ids)
    first = FREEZER.freeze_circuits(model, InterventionConfig([0], [1], freeze_type="mean"))
    alone = logits(model, ids)
    del model.model.forward
    second = FREEZER.freeze_circuits(model, InterventionConfig([1], [1], freeze_type="mean"))
    both = logits(model, ids)
    second.remove()
    assert torch.equal(logits(model, ids), alone)
    assert not torch.equal(both, alone)
    first.remove()
    assert torch.equal(logits(model, ids), clean)
    assert attributes(model) == attributes(tiny_model("llama"))


def test_a_vector_beneath_a_wrapper_is_not_removed(ids):
    from steered import vector_of

    model = tiny_model("llama")
    clean, vector = logits(model, ids), vector_of(model)
    steered = vector.apply(model)
    layer = model.model.layers[vector.layer]
    for wrapper in WRAPPERS.values():
        old = layer.forward
        layer.forward = wrapper(layer, old)
        for change in (steered.remove, lambda: vector.apply(model)):
            with pytest.raises(CircuitFreezeError, match="was replaced again"):
                change()
        layer.forward = old
    steered.remove()
    assert torch.equal(logits(model, ids), clean)


def copied_attributes(module):
    other = type(module).__new__(type(module))
    other.__dict__.update(vars(module))
    return other


COPIES = {"shallow": copy.copy, "deep": copy.deepcopy}


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("target", TARGETS)
def test_a_frozen_module_is_not_copied(target, kind, ids):
    model = tiny_model("llama_gqa")
    module = model.get_submodule(TARGETS[target])
    with FREEZER.freeze_circuits(model, CONFIG), pytest.raises(CircuitFreezeError, match="remove the freeze first"):
        COPIES[kind](module)
    assert type(COPIES[kind](module)) is type(module)


def test_a_shallow_copy_of_what_holds_frozen_modules_is_unfrozen_with_them(ids):
    model = tiny_model("llama_gqa")
    clean = logits(model, ids)
    with FREEZER.freeze_circuits(model, CONFIG):
        frozen = logits(model, ids)
        other = copy.copy(model)
        assert torch.equal(logits(other, ids), frozen)
    assert torch.equal(logits(other, ids), clean)


def test_a_model_of_compiled_regions_that_was_made_under_a_freeze_raises_until_it_is_removed(ids):
    utils = pytest.importorskip("accelerate.utils", reason="the extra 'conditions' is not installed")
    model = tiny_model("llama_gqa")
    clean = logits(model, ids)
    with FREEZER.freeze_circuits(model, CONFIG):
        other = utils.compile_regions(model, backend="eager")
        with pytest.raises(CircuitFreezeError, match="this LlamaModel is a copy of a frozen one"):
            logits(other, ids)
    assert torch.equal(logits(model, ids), clean)
    torch.testing.assert_close(logits(other, ids), clean)


def test_a_module_with_the_attributes_of_a_frozen_one_is_unfrozen_with_it(ids):
    model = tiny_model("llama_gqa")
    attention = model.model.layers[0].self_attn
    x = torch.ones(1, 3, 32)
    clean = attention.v_proj(x)
    with freeze_ov_circuit(model, [0], [1]):
        other = copied_attributes(attention.v_proj)
        assert not torch.equal(other(x), clean)
        with FREEZER.freeze_circuits(model, InterventionConfig([0], [2])):
            pass
    assert torch.equal(other(x), clean)


def test_whoever_keeps_a_frozen_forward_gets_the_unfrozen_one_afterwards(ids):
    model = tiny_model("llama_gqa")
    clean = logits(model, ids)
    with FREEZER.freeze_circuits(model, CONFIG):
        kept = {target: model.get_submodule(target).forward for target in TARGETS.values()}
    for target, forward in kept.items():
        model.get_submodule(target).forward = forward
        assert torch.equal(logits(model, ids), clean)


def test_a_projection_that_is_replaced_under_the_freeze_raises(ids):
    model = tiny_model("llama_gqa")
    attention = model.model.layers[0].self_attn
    clean = logits(model, ids)
    for scope in ("group", "head"):
        for change in (lambda one: torch.compile(one, backend="eager"), nn.Sequential, copy.deepcopy):
            own = attention.v_proj
            other = change(own)
            frozen = FREEZER.freeze_circuits(model, InterventionConfig([0], [1], "v", kv_scope=scope))
            attention.v_proj = other
            with pytest.raises(FreezeNotInForceError, match=r"v_proj of .* was wrapped or replaced after the freeze"):
                logits(model, ids)
            frozen.remove()
            attention.v_proj = own
            assert torch.equal(logits(model, ids), clean)
