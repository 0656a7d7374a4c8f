"""PEFT: a model that LoRA wraps is frozen at what attention reads, the projection with its adapter.

What these need is the extra `conditions`, which CI installs; without it they say that it is missing.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_freeze import FREEZER, agrees, config_of, frozen_logits, logits, plain_freeze

from freeze_core import ExperimentalInterventions, FreezeNotInForceError
from pytest_circuitfreeze.models import tiny_model

TARGETS = {
    "gpt2": ["c_attn", "c_proj"],
    "llama_gqa": ["q_proj", "v_proj"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj"],
    "falcon_mqa": ["query_key_value", "dense"],
}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


def wrapped(model: Any, name: str) -> Any:
    """`model` with adapters that do something, drawn alike each time."""
    peft = pytest.importorskip("peft", reason="the extra 'conditions' is not installed")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=TARGETS[name], init_lora_weights=False, r=4)
        return peft.get_peft_model(model, config).eval()


def merged(name: str) -> Any:
    """The plain model with the adapters' weights added to its own."""
    return wrapped(tiny_model(name, attn="eager"), name).merge_and_unload()


@pytest.mark.parametrize("scope", ["group", "head"])
@pytest.mark.parametrize("freeze_type", ["zero", "mean", "noise", "reference", "resample"])
@pytest.mark.parametrize("name", TARGETS)
def test_wrapped_before_the_freeze(name: str, freeze_type: str, scope: str) -> None:
    plain, model = merged(name), wrapped(tiny_model(name), name)
    config = config_of(freeze_type, plain, kv_scope=scope)
    unfrozen = logits(model)
    agrees(frozen_logits(model, config), unfrozen, plain_freeze(plain, config))
    assert torch.equal(logits(model), unfrozen)


@pytest.mark.parametrize("name", TARGETS)
def test_wrapped_under_a_freeze(name: str) -> None:
    """What was frozen is a part of what attention now reads: an error, and nothing of it stays behind."""
    model = tiny_model(name)
    with FREEZER.freeze_circuits(model, config_of("zero", model)):
        adapted = wrapped(model, name)
        with pytest.raises(FreezeNotInForceError, match="wrapped or replaced after the freeze"):
            logits(adapted)
    assert torch.equal(logits(adapted), logits(wrapped(tiny_model(name), name)))
    config = config_of("zero", model)
    agrees(frozen_logits(adapted, config), logits(adapted), plain_freeze(merged(name), config))


@pytest.mark.parametrize("name", ["gpt2", "opt", "falcon_mqa"])
def test_whole_heads_wrapped_under_a_freeze(name: str) -> None:
    """The output projection with its adapter reads z, and not the frozen one alone."""
    model = tiny_model(name)
    with ExperimentalInterventions().freeze_attention_heads(model, {0: [1]}):
        adapted = wrapped(model, name)
        with pytest.raises(FreezeNotInForceError, match="wrapped or replaced after the freeze"):
            logits(adapted)


def test_an_adapter_learns_through_a_freeze() -> None:
    """Gradients reach the adapters of what is not frozen, and are zeros where all heads are."""
    model = wrapped(tiny_model("llama_gqa"), "llama_gqa")
    with FREEZER.freeze_circuits(model, config_of("mean", model, circuit="ov", head_indices=None)):
        model(input_ids=torch.arange(6)[None], use_cache=False).logits.square().mean().backward()
    norms = {name: float(one.grad.abs().max()) for name, one in model.named_parameters() if one.grad is not None}
    frozen = [size for name, size in norms.items() if "v_proj" in name and ".layers.1." not in name]
    free = [size for name, size in norms.items() if "v_proj" in name and ".layers.1." in name]
    assert frozen == [0.0] * 4
    assert all(size > 0 for size in free)
    assert len(free) == 2
