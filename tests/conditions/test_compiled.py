"""`torch.compile(fullgraph=True)`: compiled before the freeze or under it, the freeze is in force, and out again after.

Only shapes are known while a pass is traced, and no step may leave the graph. The backend `eager` runs what was traced
as it is, so results are bit for bit; torch's default one generates code, and rounds otherwise.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from plain_freeze import FREEZE_TYPES, FREEZER, IDS, agrees, config_of, frozen_logits, logits, plain, plain_freeze
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

from freeze_core import InterventionConfig, InterventionError
from pytest_circuitfreeze.models import tiny_model

CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"

# Both from inside torch's own compiler.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit:DeprecationWarning", "ignore:.*should not be instantiated:DeprecationWarning"
)
MASK = torch.ones_like(IDS)
MASK[1, :2] = 0


@pytest.fixture(autouse=True)
def _nothing_compiled_yet() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model: Any, backend: str = "eager") -> Any:
    return torch.compile(model, fullgraph=True, backend=backend)


@pytest.mark.parametrize(
    ("name", "scope", "freeze_type"),
    [*(("llama_gqa", "head", each) for each in FREEZE_TYPES), ("gpt2", "group", "noise")],
)
def test_compiled_before_the_freeze(name: str, scope: str, freeze_type: str) -> None:
    config, wanted = plain(name, freeze_type, kv_scope=scope)
    model = tiny_model(name)
    traced = compiled(model)
    unfrozen = logits(traced)
    frozen = frozen_logits(model, config, lambda: logits(traced))
    agrees(frozen, unfrozen, wanted)
    assert torch.equal(frozen, frozen_logits(model, config))
    assert torch.equal(logits(traced), unfrozen)


@pytest.mark.parametrize(
    ("name", "scope", "freeze_type"), [("falcon_mqa", "head", "noise"), ("mistral_gqa", "group", "resample")]
)
def test_compiled_under_the_freeze(name: str, scope: str, freeze_type: str) -> None:
    config, wanted = plain(name, freeze_type, kv_scope=scope)
    model = tiny_model(name)
    unfrozen = logits(model)
    with FREEZER.freeze_circuits(model, config):
        traced = compiled(model)
        agrees(logits(traced), unfrozen, wanted)
    assert torch.equal(logits(traced), unfrozen)


@pytest.mark.parametrize("freeze_type", ["noise", "reference"])
def test_padding(freeze_type: str) -> None:
    """Which positions are real is a value: it is not looked at while tracing."""
    model = tiny_model("llama_gqa")
    config = config_of(freeze_type, model)
    if freeze_type == "reference":
        config.reference = FREEZER.record(model, {"input_ids": IDS.flip(1), "attention_mask": MASK})
    traced = compiled(model)
    wanted = frozen_logits(model, config, lambda: logits(model, attention_mask=MASK))
    got = frozen_logits(model, config, lambda: logits(traced, attention_mask=MASK))
    assert torch.equal(got, wanted)
    assert not torch.equal(got, logits(traced, attention_mask=MASK))


@pytest.mark.parametrize(("freeze_type", "backend"), [("resample", "eager"), ("reference", "aot_eager")])
def test_a_pass_that_cannot_be_served(freeze_type: str, backend: str) -> None:
    """It is refused when it runs, since padding is only known then."""
    model = tiny_model("llama_gqa")
    config = config_of(freeze_type, model)
    traced = compiled(model, backend)
    with FREEZER.freeze_circuits(model, config), pytest.raises(InterventionError, match=r"padding|padded alike"):
        logits(traced, attention_mask=MASK)


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("fault", ["mask of another shape", "reference of another length", "one row", "cached tokens"])
def test_a_pass_whose_shape_cannot_be_served(fault: str, fullgraph: bool) -> None:
    """Its shape is known when it is traced already; the refusal is ours all the same, and comes when it runs."""
    model = tiny_model("llama_gqa")
    ids = torch.arange(14).view(2, 7)
    config, given, message = {
        "mask of another shape": (
            InterventionConfig([0], freeze_type="mean"),
            {"input_ids": ids, "attention_mask": torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()},
            r"attention_mask is \[2, 1, 7, 7\]",
        ),
        "reference of another length": (
            InterventionConfig([0], freeze_type="reference", reference=FREEZER.record(model, ids[:, :5])),
            {"input_ids": ids},
            "the reference's q is",
        ),
        "one row": (InterventionConfig([0], freeze_type="resample"), {"input_ids": ids[:1]}, "this pass has 1 row"),
        "cached tokens": (InterventionConfig([0], freeze_type="mean"), {"input_ids": ids[:, 6:]}, "after 6 cached"),
    }[fault]
    traced = torch.compile(model, backend="eager", fullgraph=fullgraph)
    with FREEZER.freeze_circuits(model, config), torch.no_grad():
        if fault == "cached tokens":
            output = model(ids[:, :6], use_cache=True)
            given |= {name: value for name, value in output.items() if isinstance(value, DynamicCache)}
        with pytest.raises(InterventionError, match=message):
            traced(**given)


def test_a_second_model_of_the_same_class() -> None:
    """Each of two models, compiled both, is frozen by itself, with draws of its own."""
    one, other = tiny_model("llama_gqa"), tiny_model("llama_gqa", seed=1)
    traced, traced_other = compiled(one), compiled(other)
    unfrozen, unfrozen_other = logits(traced), logits(traced_other)
    config, config_other = config_of("noise", one), config_of("noise", other, seed=4)
    wanted, wanted_other = frozen_logits(one, config), frozen_logits(other, config_other)
    with FREEZER.freeze_circuits(one, config):
        assert torch.equal(logits(traced), wanted)
        assert torch.equal(logits(traced_other), unfrozen_other)
        with FREEZER.freeze_circuits(other, config_other):
            assert torch.equal(logits(traced_other), wanted_other)
            assert torch.equal(logits(traced), wanted)
        assert torch.equal(logits(traced_other), unfrozen_other)
    assert torch.equal(logits(traced), unfrozen)
    assert not torch.equal(wanted, unfrozen)
    assert not torch.equal(wanted_other, unfrozen_other)


def test_other_lengths_and_seeds() -> None:
    """Tables of noise are drawn for the columns that a pass has, and for the seed that is live."""
    model = tiny_model("llama_gqa")
    traced = compiled(model)
    for seed, tokens in ((3, 7), (3, 5), (4, 5)):
        config, ids = config_of("noise_std", model, seed=seed), IDS[:, :tokens]
        with FREEZER.freeze_circuits(model, config), torch.no_grad():
            got, wanted = (run(ids, use_cache=False).logits for run in (traced, model))
        assert torch.allclose(got, wanted, rtol=0, atol=1e-5), (seed, tokens)


def test_gradients() -> None:
    """Backward through a compiled pass."""
    model = tiny_model("llama_gqa")
    traced = compiled(model, "aot_eager")

    def gradient(run: Any) -> torch.Tensor:
        loss = run(IDS, use_cache=False).logits.square().mean()
        return torch.autograd.grad(loss, model.get_input_embeddings().weight)[0]

    unfrozen = gradient(traced)
    with FREEZER.freeze_circuits(model, config_of("noise", model, backward_mode="ste")):
        got, wanted = gradient(traced), gradient(model)
    assert (got - wanted).abs().max() < 1e-3 * (got - unfrozen).abs().max()


def test_generated_code() -> None:
    """The default backend, on noise with statistics: the freeze that leans most on what is not traced."""
    config, wanted = plain("llama_gqa", "noise", kv_scope="head")
    model = tiny_model("llama_gqa")
    traced = compiled(model, "inductor")
    agrees(frozen_logits(model, config, lambda: logits(traced)), logits(traced), wanted)


@pytest.mark.parametrize("static", [False, True])
def test_decoding_with_a_cache(static: bool) -> None:
    """A prompt and one token more, each a compiled pass under noise: the columns go on where the cache ends."""
    model = tiny_model("llama_gqa")
    traced, config = compiled(model), config_of("noise_std", model)

    def decode(run: Any) -> torch.Tensor:
        cache = StaticCache(config=model.config, max_cache_len=16) if static else DynamicCache(config=model.config)
        with torch.no_grad():
            return torch.cat([run(ids, **{CACHE: cache}).logits for ids in (IDS[:, :6], IDS[:, 6:])], dim=1)

    wanted = plain_freeze(tiny_model("llama_gqa"), config)
    with FREEZER.freeze_circuits(model, config):
        frozen = decode(traced)
    agrees(frozen, decode(traced), wanted)
