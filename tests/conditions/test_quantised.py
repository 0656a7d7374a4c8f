"""Quantised weights: the freeze is that of the plain model whose weights are what the quantised ones stand for.

What these need is the extra `conditions`, which CI installs; without it they say that it is missing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_freeze import FREEZER, IDS, agrees, config_of, frozen_logits, logits, plain_freeze
from torch import Tensor, nn

from freeze_core import FreezeNotInForceError, InterventionError, copying_scores, head_circuits, score_heads
from pytest_circuitfreeze.models import tiny_model

Scheme = tuple[Callable[[Any], Any], Callable[[nn.Module], Tensor]]
"""Quantises a model, and says what a quantised linear layer's weight stands for."""


def projections(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers within the decoder's layers."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name
    }


def torchao() -> Scheme:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = pytest.importorskip("torchao.quantization", reason="the extra 'conditions' is not installed")

    def quantise(model: Any) -> Any:
        quantization.quantize_(
            model, quantization.Int8WeightOnlyConfig(), filter_fn=lambda module, name: name in projections(model)
        )
        return model

    return quantise, lambda linear: linear.weight.dequantize()


def quanto() -> Scheme:
    library = pytest.importorskip("optimum.quanto", reason="the extra 'conditions' is not installed")

    def quantise(model: Any) -> Any:
        library.quantize(model, weights=library.qint8, include=list(projections(model)))
        library.freeze(model)
        return model

    return quantise, lambda linear: linear.weight.dequantize()


def bitsandbytes() -> Scheme:
    library = pytest.importorskip("bitsandbytes", reason="the extra 'conditions' is not installed")

    def quantise(model: Any) -> Any:
        for name, linear in projections(model).items():
            parent, _, child = name.rpartition(".")
            packed = library.nn.Linear4bit(
                linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=torch.float32
            )
            packed.weight = library.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
            packed.bias = linear.bias
            setattr(model.get_submodule(parent), child, packed)
        return model.to("cpu")

    def stands_for(linear: Any) -> Tensor:
        found: Tensor = library.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
        return found

    return quantise, stands_for


SCHEMES = {"torchao int8": torchao, "quanto int8": quanto, "bitsandbytes nf4": bitsandbytes}


def dequantised(name: str, quantised: Any, stands_for: Callable[[nn.Module], Tensor]) -> Any:
    """The plain tiny model `name` with the weights that the quantised one has."""
    model = tiny_model(name, attn="eager")
    with torch.no_grad():
        for path, linear in projections(model).items():
            linear.weight.copy_(stands_for(quantised.get_submodule(path)))
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("scope", ["group", "head"])
@pytest.mark.parametrize("freeze_type", ["zero", "mean", "noise", "reference", "resample"])
@pytest.mark.parametrize("name", ["llama_gqa", "opt"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantised_weights(scheme: str, name: str, freeze_type: str, scope: str) -> None:
    quantise, stands_for = SCHEMES[scheme]()
    model = quantise(tiny_model(name))
    plain = dequantised(name, model, stands_for)
    config = config_of(freeze_type, plain, kv_scope=scope)
    unfrozen = logits(model)
    agrees(frozen_logits(model, config), unfrozen, plain_freeze(plain, config))
    assert torch.equal(logits(model), unfrozen)
    assert not torch.equal(logits(tiny_model(name)), unfrozen), "nothing was quantised"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantised_under_a_freeze(scheme: str) -> None:
    """Weights that change in place stay frozen; a projection that is replaced by another is an error, not a no-op."""
    quantise, _ = SCHEMES[scheme]()
    model, wanted = tiny_model("llama_gqa"), quantise(tiny_model("llama_gqa"))
    config = config_of("mean", model)
    with FREEZER.freeze_circuits(model, config):
        quantise(model)
        if scheme == "torchao int8":
            assert torch.equal(logits(model), frozen_logits(wanted, config))
        else:
            with pytest.raises(FreezeNotInForceError, match=r"q_proj|ran without"):
                logits(model)
    assert torch.equal(logits(model), logits(wanted))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_checkpoint_is_of_the_quantised_values(scheme: str, tmp_path: Path) -> None:
    quantise, _ = SCHEMES[scheme]()
    asked: dict[str, Any] = {"progress": False, "checkpoint": tmp_path / "sweep"}
    found = score_heads(quantise(tiny_model("llama_gqa")), IDS, "loss", **asked)
    again = score_heads(quantise(tiny_model("llama_gqa")), IDS, "loss", **asked)
    assert torch.equal(found.scores["qk"], again.scores["qk"])
    other = tiny_model("llama_gqa")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    told = (
        "the clean logits" if "nf4" in scheme else "there and here: model's parameters"
    )  # whose scales are in neither
    with pytest.raises(InterventionError, match=told):
        score_heads(quantise(other), IDS, "loss", **asked)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_circuits_are_of_what_the_weights_stand_for(scheme: str) -> None:
    quantise, stands_for = SCHEMES[scheme]()
    model = quantise(tiny_model("llama_gqa"))
    plain = dequantised("llama_gqa", model, stands_for)
    found, wanted = (head_circuits(one, 1, 3, offsets=[2], fold_norm=True) for one in (model, plain))
    assert torch.allclose(found.qk(2).matrix(), wanted.qk(2).matrix(), atol=1e-5)
    assert torch.allclose(found.ov.matrix(), wanted.ov.matrix(), atol=1e-5)
    scores = [copying_scores(one).values["copying"] for one in (model, plain)]
    assert torch.allclose(*scores, atol=1e-3)
