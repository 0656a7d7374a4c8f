"""Models whose projections are more than their weights, or that are wrapped, are judged by what their modules do.

Adapters of PEFT, parametrizations, quantised weights, parameters that learn nothing, compiled models and wrappers. What
needs the extra `conditions`, which CI installs, says that it is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from freeze_core import AttentionCircuitFreezer, InterventionConfig
from pytest_circuitfreeze import checks
from pytest_circuitfreeze.models import tiny_model
from pytest_circuitfreeze.suites.claims import ClaimBroken
from pytest_circuitfreeze.suites.judge.site_lookup import sites

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

FREEZER = AttentionCircuitFreezer()
SKIP = "the extra 'conditions' is not installed"


def adapted(kind: str, name: str, **fields: Any) -> Any:
    peft = pytest.importorskip("peft", reason=SKIP)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny_model(name), getattr(peft, f"{kind}Config")(**fields)).eval()
        for parameter_name, parameter in model.named_parameters():
            if "ia3_l" in parameter_name:
                parameter.data.uniform_(0.5, 1.5)
    return model


def lora(name: str = "llama", targets: Sequence[str] = ("q_proj", "v_proj"), **fields: Any) -> Any:
    return adapted("Lora", name, r=2, target_modules=list(targets), init_lora_weights=False, **fields)


def ia3() -> Any:
    return adapted("IA3", "llama", target_modules=["k_proj", "v_proj"], feedforward_modules=[], task_type="CAUSAL_LM")


def added_adapter() -> Any:
    peft = pytest.importorskip("peft", reason=SKIP)
    model = tiny_model("llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["k_proj", "v_proj"], init_lora_weights=False))
    return model.requires_grad_(True).eval()


def weight_normed() -> Any:
    model = tiny_model("llama")
    for layer in model.model.layers:
        nn.utils.parametrizations.weight_norm(layer.self_attn.v_proj)
    return model


def spectral_normed() -> Any:
    model = tiny_model("mistral_gqa")
    for layer in model.model.layers:
        nn.utils.parametrizations.spectral_norm(layer.self_attn.q_proj)
    return model.eval()


def partly_frozen() -> Any:
    model = tiny_model("gpt2")
    model.transformer.wte.requires_grad_(False)
    model.transformer.wpe.requires_grad_(False)
    model.transformer.h[0].requires_grad_(False)
    model.transformer.h[1].attn.c_attn.weight.requires_grad_(False)
    return model


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def quantised() -> Any:
    library = pytest.importorskip("bitsandbytes", reason=SKIP)
    model = tiny_model("llama")
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and ".layers." in name:
            parent, _, child = name.rpartition(".")
            packed = library.nn.Linear4bit(
                linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=torch.float32
            )
            packed.load_state_dict(linear.state_dict())
            setattr(model.get_submodule(parent), child, packed.to("cpu"))
    return model.eval()


MODELS: dict[str, Callable[[], Any]] = {
    "lora": lambda: lora(task_type="CAUSAL_LM"),
    "lora without a task": lora,
    "lora of a fused projection": lambda: lora("gpt2", ["c_attn", "c_proj"], fan_in_fan_out=True),
    "lora of all projections, found by experiment": lambda: lora("qwen3", ["q_proj", "k_proj", "v_proj", "o_proj"]),
    "dora": lambda: lora(use_dora=True),
    "ia3": ia3,
    "add_adapter": added_adapter,
    "weight norm": weight_normed,
    "spectral norm": spectral_normed,
    "nothing learns": lambda: tiny_model("llama").requires_grad_(False),
    "some learn": partly_frozen,
    "wrapper": lambda: Wrapper(tiny_model("llama")).eval(),
    "quantised": quantised,
}


def freeze(model: nn.Module, config: InterventionConfig) -> Any:
    return FREEZER.freeze_circuits(model, config)


def outcome(claim: str, model: nn.Module) -> str:
    try:
        return checks.check(claim, model, freeze, examples=2)[0].outcome
    except checks.NothingChecked as nothing:
        return "n/a" if f"{claim} (n/a)" in str(nothing) else str(nothing)


@pytest.mark.parametrize("name", MODELS)
def test_a_right_freeze_is_accepted(name: str) -> None:
    model = MODELS[name]()
    for claim in ("values_are_the_oracles", "gradients_are_the_estimators", "removal_leaves_no_trace"):
        assert checks.check(claim, model, freeze, examples=3)[0].outcome == "passed"
    # These say nothing where weights are computed or nothing learns, and must not end in an error of their own.
    for claim in ("storage_does_not_matter", "full_strength_replaces_anything", "recomputation_is_the_same_pass"):
        assert outcome(claim, model) in ("passed", "n/a")


def test_a_right_freeze_of_a_compiled_model_is_accepted() -> None:
    model = torch.compile(tiny_model("gpt2"), backend="eager")
    for claim in ("zero_strength_is_unfrozen", "values_are_the_oracles"):
        assert checks.check(claim, model, freeze, examples=1)[0].outcome == "passed"


@pytest.mark.parametrize("name", ["lora", "ia3", "weight norm", "quantised", "some learn", "wrapper"])
def test_wrong_freezes_are_refused(name: str) -> None:
    model = MODELS[name]()

    def other_head(model: nn.Module, config: InterventionConfig) -> Any:
        assert config.head_indices is not None
        return freeze(model, replace(config, head_indices=[(head + 1) % 4 for head in config.head_indices]))

    def straight_through(model: nn.Module, config: InterventionConfig) -> Any:
        return freeze(model, replace(config, backward_mode="ste"))

    def weaker(model: nn.Module, config: InterventionConfig) -> Any:
        return freeze(model, replace(config, strength=0.9 * config.strength))

    config = InterventionConfig(layer_indices=[1], head_indices=[1], circuit="ov")
    for claim, wrong in (
        ("values_are_the_oracles", other_head),
        ("values_are_the_oracles", weaker),
        ("gradients_are_the_estimators", straight_through),
    ):
        with pytest.raises(ClaimBroken):
            checks.check(claim, model, wrong, config, examples=3)


def test_plain_projections_are_judged_by_heart_and_others_by_their_modules() -> None:
    model = tiny_model("llama")
    assert all(site.formula is not None for site in sites(model).values())
    handle = model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, args, output: None)
    assert all(site.formula is None for site in sites(model).values())
    assert checks.check("values_are_the_oracles", model, freeze, examples=3)[0].outcome == "passed"
    handle.remove()
    assert all(site.formula is not None for site in sites(model).values())


class TakesTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_model("llama")

    def forward(self, tokens: torch.Tensor) -> Any:
        return self.inner(tokens)


class Raises(nn.Linear):
    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        raise RuntimeError("out of order")


def test_a_model_that_cannot_be_run_is_an_error_that_says_why() -> None:
    model = tiny_model("llama")
    with (
        FREEZER.freeze_circuits(model, InterventionConfig(layer_indices=[0])),
        pytest.raises(ValueError, match="frozen or steered already"),
    ):
        checks.check_removal(model, freeze)
    with pytest.raises(ValueError, match=r"takes no input_ids \(its forward takes tokens\)"):
        checks.check_removal(TakesTokens().eval(), freeze)
    with pytest.raises(ValueError, match="takes no input_ids"):
        checks.check_removal(Wrapper(nn.Linear(1, 1)).eval(), freeze)
    with pytest.raises(ValueError, match="a pass over two tokens ended in RuntimeError: out of order"):
        checks.check_removal(Raises(1, 1).eval(), freeze)


@pytest.mark.parametrize("kind", ["PromptTuning", "PrefixTuning"])
def test_virtual_tokens_are_refused_by_name(kind: str) -> None:
    model = adapted(kind, "llama", num_virtual_tokens=3, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="virtual tokens stand before each prompt"):
        checks.check_removal(model, freeze)
