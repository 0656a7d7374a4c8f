"""A vector that is added keeps the promises of a freeze: against hooks by hand, and in what it leaves behind."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from freeze_core import (
    AttentionCircuitFreezer,
    CircuitFreezeError,
    ExperimentalInterventions,
    FreezeNotInForceError,
    InterventionConfig,
    InterventionError,
    InterventionVector,
    StaleCacheWarning,
    UnsupportedModelError,
    score_heads,
)
from freeze_core.statistics import model_identity
from freeze_core.vectors.sites import find_residual, stream_of
from pytest_circuitfreeze.models import TINY, tiny_model
from pytest_circuitfreeze.shrinking import tiny_of_type

FREEZER = AttentionCircuitFreezer()
DEFAULT = ["gpt2", "llama", "mistral_gqa", "falcon_mqa"]  # the layers of the last give tuples
GENERATOR = torch.Generator().manual_seed(0)
PROMPTS = torch.randint(0, 60, (8, 7), generator=GENERATOR)
IDS = torch.randint(0, 60, (3, 7), generator=GENERATOR)
LEFT = (torch.arange(7) >= torch.tensor([[0], [2], [4]])).long()
RIGHT = (torch.arange(7) < torch.tensor([[7], [5], [3]])).long()


def vector_of(model: Any, layer: int = 1, seed: int = 1) -> InterventionVector:
    """Any vector of a model: what is tested here is how it is added."""
    found = ExperimentalInterventions().discover_intervention_vector(
        model, PROMPTS[:4], PROMPTS[4:], layer, resamples=100, progress=False
    )
    drawn = torch.randn(len(found.vector), generator=torch.Generator().manual_seed(seed), dtype=found.vector.dtype)
    return replace(found, vector=drawn)


def logits(model: Any, ids: Tensor = IDS, **given: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False, **given).logits


def by_hand(model: Any, layer: int, add: Callable[[Tensor], Tensor], **given: Any) -> Tensor:
    """The logits of a pass in which a forward hook changes the stream after a layer."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        return (add(output[0]), *output[1:]) if isinstance(output, tuple) else add(output)

    layers = next(one for one in model.modules() if isinstance(one, torch.nn.ModuleList))
    handle = layers[layer].register_forward_hook(hook)
    found = logits(model, **given)
    handle.remove()
    return found


def state(model: Any) -> list[Any]:
    """All that is on a model's modules, by name and identity."""
    kept = []
    for name, module in model.named_modules():
        attributes = {key: id(value) for key, value in vars(module).items() if not key.startswith("_")}
        several = {key: [*map(id, value.values())] for key, value in vars(module).items() if isinstance(value, dict)}
        kept.append((name, attributes, several))
    return kept


@pytest.mark.parametrize("architecture", sorted(TINY))
def test_every_architecture_is_steered_as_by_a_hook_by_hand(architecture: str) -> None:
    model = tiny_model(architecture)
    vector = vector_of(model)
    clean = logits(model)
    with vector.apply(model, strength=1.5):
        steered = logits(model)
    assert torch.equal(steered, by_hand(model, 1, lambda x: x + 1.5 * vector.vector))
    assert not torch.equal(steered, clean)
    assert torch.equal(logits(model), clean)


@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize("strength", [-0.5, 1, 3.0])
@pytest.mark.parametrize("architecture", DEFAULT)
def test_strengths_and_layers_are_those_of_a_hook_by_hand(architecture: str, strength: float, layer: int) -> None:
    model = tiny_model(architecture)
    vector = vector_of(model, layer)
    with vector.apply(model, strength):
        steered = logits(model)
    assert torch.equal(steered, by_hand(model, layer, lambda x: x + strength * vector.vector))


def test_the_stream_after_the_last_layer_is_that_before_the_final_norm() -> None:
    model = tiny_model("llama")
    vector = vector_of(model, -1)
    seen = []
    hook = model.model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits(model)
    hook.remove()
    with vector.apply(model, 2.0), torch.no_grad():
        expected = model.lm_head(model.model.norm(seen[0] + 2 * vector.vector))
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("architecture", DEFAULT)
def test_strength_0_is_bit_for_bit_the_unsteered_model(architecture: str) -> None:
    model = tiny_model(architecture)
    vector = vector_of(model)
    clean, cache = logits(model), DynamicCache()
    with torch.no_grad():
        model(IDS[:, :4], past_key_values=cache)
    with vector.apply(model, 0.0), warnings.catch_warnings():
        warnings.simplefilter("error")  # a cache that was filled without it is as good
        assert torch.equal(logits(model), clean)
        with torch.no_grad():
            model(IDS[:, 4:], past_key_values=cache)
    layer = find_residual(model, 1).module
    own = layer.forward

    def negative_zeros(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        zeros = -0.0 * stream_of(output, "layer").abs()
        return (zeros, *output[1:]) if isinstance(output, tuple) else zeros

    layer.forward = negative_zeros  # adding 0 would lose the sign
    seen: list[Tensor] = []
    with vector.apply(model, 0.0):
        hook = layer.register_forward_hook(lambda module, args, output: seen.append(stream_of(output, "layer")))
        logits(model)
        hook.remove()
    assert bool(seen[0].signbit().all())


@pytest.mark.parametrize("architecture", DEFAULT)
@pytest.mark.parametrize("raising", ["nothing", "body", "forward", "pass"])
def test_nothing_is_left_after_removal(architecture: str, raising: str) -> None:
    model = tiny_model(architecture).train()
    vector = vector_of(model.eval())
    before, clean = state(model), logits(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    drawn, flags = torch.get_rng_state(), [module.training for module in model.modules()]
    try:
        with vector.apply(model, 2.0, [0, 3]):
            assert model.state_dict().keys() == weights.keys()
            if raising == "body":
                raise KeyError
            logits(model)
            if raising == "forward":
                model(IDS + 10_000)
            if raising == "pass":
                logits(model, IDS[:, :2])  # which has no column 3
    except (KeyError, IndexError, InterventionError):
        assert raising != "nothing"
    else:
        assert raising == "nothing"
    assert state(model) == before
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(logits(model), clean)


def test_what_others_hold_is_not_written_to() -> None:
    model = tiny_model("llama")
    vector = vector_of(model)
    layer, held = model.model.layers[1], []
    own = layer.forward

    def keeping(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        held.append((output, output.clone()))
        return output

    layer.forward = keeping
    mine = vector.vector.clone()
    with vector.apply(model, positions="last"), vector.apply(model):
        logits(model)
    assert torch.equal(*held[0])
    assert torch.equal(vector.vector, mine)
    with vector.apply(model):
        expected = logits(model)
        vector.vector.zero_()  # a live vector is not changed by this
        assert torch.equal(logits(model), expected)
    assert layer.forward is keeping


def test_a_copy_of_a_steered_model_is_an_error() -> None:
    model = tiny_model("gpt2")
    with vector_of(model).apply(model):
        for copied in (copy.deepcopy, pickle.dumps):
            with pytest.raises(CircuitFreezeError, match=r"cannot be copied or pickled"):
                copied(model)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


@pytest.mark.parametrize("architecture", DEFAULT)
def test_several_vectors_and_freezes_compose_and_leave_in_any_order(architecture: str) -> None:
    """Each two that are left are what they are by themselves, whatever was between."""
    model = tiny_model(architecture)
    one, two, other = vector_of(model, 1, 1), vector_of(model, 1, 2), vector_of(model, 0, 3)
    config = InterventionConfig([1], [0, 2], "ov", freeze_type="mean")
    making: dict[str, Callable[[], Any]] = {
        "one": lambda: one.apply(model, 2.0),
        "two": lambda: two.apply(model, -1.0, "last"),
        "other": lambda: other.apply(model, 0.5, [2]),
        "freeze": lambda: FREEZER.freeze_circuits(model, config),
    }
    before, clean = state(model), logits(model)
    alone = {}
    for left in ({name} for name in making):
        with ExitStack() as stack:
            for name in left:
                stack.enter_context(making[name]())
            alone[frozenset(left)] = logits(model)
    assert len({str(value) for value in alone.values()}) == len(making)
    for order in permutations(making):
        live = {name: made() for name, made in making.items()}
        for place, name in enumerate(order):
            live[name].remove()
            live[name].remove()  # twice is harmless
            left = frozenset(order[place + 1 :])
            if len(left) == 1:
                assert torch.equal(logits(model), alone[left])
        assert state(model) == before
    assert torch.equal(logits(model), clean)


def test_vectors_after_one_layer_are_added_in_order() -> None:
    model = tiny_model("falcon_mqa")
    one, two = vector_of(model, 1, 1), vector_of(model, 1, 2)
    with one.apply(model, 2.0), two.apply(model, -1.0):
        steered = logits(model)
    assert torch.equal(steered, by_hand(model, 1, lambda x: x + 2.0 * one.vector - two.vector))


@pytest.mark.parametrize("first", ["vector", "freeze"])
def test_a_vector_beside_a_freeze_is_a_hook_beside_a_freeze(first: str) -> None:
    model = tiny_model("mistral_gqa")
    vector, config = vector_of(model, 0), InterventionConfig([0, 1], [1], "qk", kv_scope="head")
    with FREEZER.freeze_circuits(model, config):
        expected = by_hand(model, 0, lambda x: x + vector.vector)
    with ExitStack() as stack:
        if first == "vector":
            stack.enter_context(vector.apply(model))
        stack.enter_context(FREEZER.freeze_circuits(model, config))
        if first == "freeze":
            stack.enter_context(vector.apply(model))
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
@pytest.mark.parametrize("architecture", DEFAULT)
def test_the_last_real_token_is_found_under_padding(architecture: str, mask: Tensor) -> None:
    model = tiny_model(architecture)
    vector = vector_of(model)

    def add(x: Tensor) -> Tensor:
        x = x.clone()
        for row in range(len(x)):
            last = max(column for column in range(7) if mask[row, column])
            x[row, last] = x[row, last] + vector.vector
        return x

    expected = by_hand(model, 1, add, attention_mask=mask)
    for entered in (model, model.base_model):
        with vector.apply(entered, positions="last"):
            assert torch.equal(logits(model, attention_mask=mask), expected)


@pytest.mark.parametrize("positions", [[1, 5], [-1, 0], range(2, 5), range(5, 100), range(0, 7, 2)], ids=str)
def test_columns_are_those_of_a_hook_by_hand(positions: Any) -> None:
    model = tiny_model("gpt2")
    vector = vector_of(model)
    columns = [column % 7 for column in positions if column < 7]

    def add(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, columns] = x[:, columns] + vector.vector
        return x

    with vector.apply(model, positions=positions):
        steered = logits(model)
    assert torch.equal(steered, by_hand(model, 1, add))


def test_other_positions_of_the_layer_stay_bit_for_bit() -> None:
    model = tiny_model("llama_gqa")
    vector, seen = vector_of(model), []
    hook = model.model.layers[1].register_forward_hook(lambda module, args, output: seen.append(output))
    clean = logits(model)
    with vector.apply(model, positions=[3]):
        steered = logits(model)
    hook.remove()
    others = [column for column in range(7) if column != 3]
    assert torch.equal(seen[0][:, others], seen[1][:, others])
    assert torch.equal(clean[:, :3], steered[:, :3])


def test_a_column_that_is_padding_or_not_there_is_an_error() -> None:
    model = tiny_model("llama")
    vector = vector_of(model)
    with vector.apply(model, positions=[1]):
        with pytest.raises(InterventionError, match=r"positions=\[1\]: one of them is padding in some row"):
            logits(model, attention_mask=LEFT)
        logits(model, attention_mask=RIGHT)
    with vector.apply(model, positions=[-1]):
        logits(model, attention_mask=LEFT)
        with pytest.raises(InterventionError, match=r"padding in some row"):
            logits(model, attention_mask=RIGHT)
    for beyond in ([7], [-8]):
        with (
            vector.apply(model, positions=beyond),
            pytest.raises(InterventionError, match="out of range; the pass ends"),
        ):
            logits(model)
    with vector.apply(model, positions=[0, -7]), pytest.raises(InterventionError, match="same of 7 columns twice"):
        logits(model)


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
            steps.append(model(IDS[:, start:end], past_key_values=cache, use_cache=True, **more).logits)
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
        cache = model(IDS, use_cache=True).past_key_values
        with pytest.raises(InterventionError, match=r"another column in this pass, after 7 cached tokens"):
            model(IDS[:, :1], past_key_values=cache)


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
            model(IDS[:, :1], past_key_values=copy.deepcopy(cache))

    with torch.no_grad():
        unsteered = model(IDS).past_key_values
        with vector.apply(model):
            steered = model(IDS).past_key_values
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


def test_a_vector_that_something_took_out_is_an_error() -> None:
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    layer, vector = model.model.layers[1], vector_of(model)
    steered = vector.apply(model)
    model.model.layers[1] = other.model.layers[1]
    with pytest.raises(FreezeNotInForceError, match=r"layers\.1 of LlamaModel was wrapped or replaced"):
        model(IDS)
    model.model.layers[1] = layer
    standing = layer.forward
    layer.forward = type(layer).forward.__get__(layer)
    with pytest.raises(FreezeNotInForceError, match=r"layers\.1 of LlamaModel was wrapped or replaced"):
        model(IDS)
    layer.forward = lambda *args, **kwargs: standing(*args, **kwargs)
    logits(model)  # what is on top runs it
    with pytest.raises(CircuitFreezeError, match="replaced again"):
        steered.remove()
    with pytest.raises(CircuitFreezeError, match="replaced again"):
        vector.apply(model)
    layer.forward = lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs)
    with pytest.raises(FreezeNotInForceError, match=r"wrapped or replaced"):
        model(IDS)
    layer.forward = standing
    steered.remove()
    assert "forward" not in vars(layer)


def test_an_undone_vector_is_told_when_it_is_removed() -> None:
    model = tiny_model("llama")
    steered = vector_of(model).apply(model)
    for module in (model.model.layers[1], model.model):
        module.forward = type(module).forward.__get__(module)
    logits(model)
    with pytest.raises(FreezeNotInForceError, match=r"layers\.1 of LlamaModel: something else had put the forwards"):
        steered.remove()


def test_a_layer_that_is_run_by_itself_is_steered_or_refused() -> None:
    model = tiny_model("gpt2")
    vector, hidden = vector_of(model), torch.randn(2, 7, 32)
    layer = model.transformer.h[1]
    expected = layer(hidden) + vector.vector
    with vector.apply(model):
        assert torch.equal(layer(hidden), expected)
        with pytest.raises(FreezeNotInForceError, match=r"h\.1 of GPT2Model is run with a cache"):
            layer(hidden, DynamicCache())
    for positions in ("last", [0], range(3)):
        with vector.apply(model, positions=positions), pytest.raises(InterventionError, match="was run by itself"):
            layer(hidden)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_are_those_of_a_hook_also_when_layers_are_run_again(reentrant: bool) -> None:
    model = tiny_model("llama_gqa").train()
    vector = vector_of(model)
    model.enable_input_require_grads()

    def gradients() -> list[Tensor | None]:
        model.zero_grad()
        model(IDS, attention_mask=LEFT).logits.square().mean().backward()
        return [parameter.grad for parameter in model.parameters()]

    hook = model.model.layers[1].register_forward_hook(lambda module, args, output: output + vector.vector)
    expected = gradients()
    hook.remove()
    model._set_gradient_checkpointing(
        True, lambda *args, **options: torch.utils.checkpoint.checkpoint(*args, use_reentrant=reentrant, **options)
    )
    with vector.apply(model):
        assert all(torch.equal(one, other) for one, other in zip(gradients(), expected, strict=True))
        loss = model(IDS, attention_mask=LEFT).logits.square().mean()
    with pytest.raises(FreezeNotInForceError, match="runs a layer again under other freezes"):
        loss.backward()


@pytest.mark.filterwarnings(
    "ignore:.torch.jit:DeprecationWarning", "ignore:.*should not be instantiated:DeprecationWarning"
)
@pytest.mark.parametrize("positions", ["all", "last", [4, 6], range(1, 9)], ids=str)
def test_a_model_that_was_compiled_before_is_steered(positions: Any) -> None:
    model = tiny_model("llama_gqa")
    vector = vector_of(model)
    torch.compiler.reset()
    traced = torch.compile(model, backend="eager", fullgraph=True)
    clean = logits(traced, attention_mask=LEFT)
    with vector.apply(model, positions=positions):
        steered = logits(traced, attention_mask=LEFT)
        assert torch.equal(steered, logits(model, attention_mask=LEFT))
        if positions == [4, 6]:
            with pytest.raises(InterventionError, match="padding in some row"):
                logits(traced, attention_mask=RIGHT)
    assert not torch.equal(steered, clean)
    assert torch.equal(logits(traced, attention_mask=LEFT), clean)
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_streams_dtype_is_kept(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype)
    vector = vector_of(model)
    assert vector.vector.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    with vector.apply(model, 0.5):
        steered = logits(model)
    assert steered.dtype == dtype
    assert torch.equal(steered, by_hand(model, 1, lambda x: x + (0.5 * vector.vector).to(dtype)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strength": float("nan")}, r"strength=nan: must be a finite number"),
        ({"strength": float("inf")}, r"strength=inf: must be"),
        ({"strength": True}, r"strength=True: must be"),
        ({"strength": "1"}, r"strength='1': must be"),
        ({"strength": 1e39}, r"strength=1e\+39: the vector times that is not finite in torch.float32"),
        ({"positions": "first"}, r"positions='first': must be 'all', 'last', a list"),
        ({"positions": []}, r"positions=\[\]: must be"),
        ({"positions": [1, 1]}, r"positions=\[1, 1\]: must be"),
        ({"positions": [True]}, r"positions=\[True\]: must be"),
        ({"positions": [0.5]}, r"positions=\[0.5\]: must be"),
        ({"positions": 3}, r"positions=3: must be"),
        ({"positions": range(0)}, r"positions=range\(0, 0\): must be"),
        ({"positions": range(-1, 3)}, r"positions=range\(-1, 3\): must be"),
        ({"on_stale_cache": "shout"}, r"on_stale_cache='shout': must be"),
    ],
)
def test_what_cannot_be_served_is_an_error_and_installs_nothing(given: dict[str, Any], message: str) -> None:
    model = tiny_model("gpt2")
    vector, before = vector_of(model), state(model)
    with pytest.raises(InterventionError, match=message):
        vector.apply(model, **given)
    assert state(model) == before


def test_another_model_is_refused() -> None:
    vector = vector_of(tiny_model("llama"), 2)
    for other, message in (
        (tiny_model("llama", seed=1), r"vector is of another model \(LlamaForCausalLM"),
        (tiny_model("gpt2"), r"vector is of another model"),
        (tiny_model("llama_70b"), r"the vector has 32 features|of another model"),
    ):
        with pytest.raises(InterventionError, match=message):
            vector.apply(other)
    wide = replace(vector, vector=torch.ones(48))
    with pytest.raises(InterventionError, match=r"vector has 48 features, and the stream of LlamaForCausalLM 32"):
        wide.apply(tiny_model("llama"))
    with pytest.raises(InterventionError, match=r"layer=5: must be an int in -3 to 2, of 3 layers"):
        replace(vector, layer=5).apply(tiny_model("llama"))
    with pytest.raises(UnsupportedModelError, match="model is a str: must be"):
        vector.apply("llama")


def test_layers_without_one_residual_stream_are_refused() -> None:
    for name in ("hrm_text", "xlm"):  # layers that run again and again; a list of attentions, and others beside it
        with pytest.raises(UnsupportedModelError, match="no one list of whole layers"):
            find_residual(tiny_model(name), 0)
    with pytest.raises(InterventionError, match=r"gives \[4, 2, 7, \d+\] where \[batch, token, hidden\]"):
        vector_of(tiny_model("gemma3n_text"))


def test_tokens_that_a_model_puts_before_others_are_no_columns() -> None:
    model = tiny_of_type("cpmant", attn="eager", fields={"prompt_length": 3})
    with pytest.raises(InterventionError, match=r"gives \[2, 10, 32\] for \[2, 7\] \[prompt, token\]"):
        vector_of(model)
    made, site = vector_of(tiny_model("llama")), find_residual(model, 1)
    vector = replace(made, origin={**made.origin, "identity": model_identity(site.sites)})
    for positions in ([0], range(3)):
        with pytest.raises(InterventionError, match="CpmAntModel puts tokens of its own before"):
            vector.apply(model, positions=positions)

    def last(x: Tensor) -> Tensor:
        return torch.cat([x[:, :-1], x[:, -1:] + vector.vector], dim=1)

    for positions, add in (("all", lambda x: x + vector.vector), ("last", last)):
        with vector.apply(model, positions=positions):
            steered = logits(model)
        assert torch.equal(steered, by_hand(model, 1, add))


def test_a_layer_that_runs_several_times_in_a_pass_is_an_error() -> None:
    model = tiny_model("llama")
    first, second = model.model.layers[1], model.model.layers[2]
    own = second.forward

    def again(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return own(first(hidden, *args, **kwargs), *args, **kwargs)

    vector = vector_of(model)
    second.forward = again
    with vector.apply(model), pytest.raises(InterventionError, match=r"layers\.1 .* runs several times in one pass"):
        logits(model)


def test_a_vector_is_neither_put_in_nor_taken_out_in_a_running_pass() -> None:
    model = tiny_model("gpt2")
    vector = vector_of(model)
    steered = vector.apply(model)
    for change in (steered.remove, lambda: vector.apply(model)):
        hook = model.transformer.h[0].register_forward_hook(lambda *given, change=change: change())
        with pytest.raises(CircuitFreezeError, match="a pass is running"):
            logits(model)
        hook.remove()
    steered.remove()


def test_a_steered_model_is_not_scored_as_if_it_were_plain() -> None:
    model = tiny_model("gpt2")
    vector = vector_of(model)
    with vector.apply(model):
        with pytest.raises(InterventionError, match="model is frozen"):
            score_heads(model, IDS, "loss", progress=False)
        with pytest.raises(InterventionError, match="model is frozen"):
            vector_of(model)
        with pytest.raises(InterventionError, match="model is frozen"):
            vector.evaluate(model, IDS, "loss", metric_positions="all", progress=False)


def test_a_layer_is_steered_through_one_model_at_a_time() -> None:
    model, other = tiny_model("llama"), tiny_model("llama")
    vector = vector_of(model)
    other.model.layers = model.model.layers
    with vector.apply(model), pytest.raises(InterventionError, match="frozen already, through another LlamaModel"):
        vector.apply(other)
