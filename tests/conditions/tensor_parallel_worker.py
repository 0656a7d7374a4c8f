"""One of the processes of `test_tensor_parallel.py`, which starts two by torchrun, with folders as arguments.

Freezes the checkpoint in each folder as it is spread over the processes, and as a whole, and says how they compare:
process 0 prints one line of JSON a freeze, every process fails on what it must refuse and does not.
"""

from __future__ import annotations

import json
import sys
import warnings
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from plain_freeze import FREEZER, IDS, config_of, frozen_logits, logits, plain_freeze
from torch import Tensor
from transformers import AutoModelForCausalLM

from freeze_core import ExperimentalInterventions, InterventionConfig, UnsupportedModelError, score_heads

HEADS = ([0], [3], [1, 2])
"""Heads of the first process, of the second, and of both."""


def main(folders: list[str]) -> None:
    for folder in folders:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # tp_plan has a newer spelling that older versions lack
            spread = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
        whole = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        unfrozen = logits(spread)
        for freeze_type, scope, heads in product(("mean", "noise", "reference"), ("group", "head"), HEADS):
            config = config_of(freeze_type, whole, kv_scope=scope, head_indices=heads)
            wanted = plain_freeze(whole, config)
            case = f"{folder} {freeze_type} {scope} {heads}"
            tell(case, frozen_logits(spread, config), unfrozen, wanted.frozen, wanted.bound)
        whole_heads(folder, spread, whole, unfrozen)
        gradients(folder, spread, whole)
        sweeps(folder, spread, whole)
        recordings(folder, spread, whole)
        refusals(folder, spread)
        if not torch.equal(logits(spread), unfrozen):
            raise AssertionError(f"{folder}: something of a freeze stayed behind")
    dist.destroy_process_group()


def tell(case: str, got: Tensor, unfrozen: Tensor, wanted: Tensor, bound: float) -> None:
    if dist.get_rank() == 0:
        error, effect = float((got - wanted).abs().max()), float((got - unfrozen).abs().max())
        print(json.dumps({"case": case, "error": error, "effect": effect, "bound": bound}), flush=True)


def whole_heads(folder: str, spread: Any, whole: Any, unfrozen: Tensor) -> None:
    bound = plain_freeze(whole, config_of("mean", whole)).bound
    for heads in HEADS:
        frozen = []
        for model in (spread, whole):
            with ExperimentalInterventions().freeze_attention_heads(model, {0: heads, 2: heads}, freeze_type="mean"):
                frozen.append(logits(model))
        tell(f"{folder} z {heads}", frozen[0], unfrozen, frozen[1], bound)


def gradients(folder: str, spread: Any, whole: Any) -> None:
    """Those of the embeddings, which every process has, through a freeze with a gradient of its own."""
    config = config_of("mean", whole, backward_mode="ste", head_indices=[1, 2])
    found: list[Tensor] = []
    for model, frozen in ((spread, True), (whole, True), (spread, False)):
        embeds = whole.get_input_embeddings()(IDS).detach().requires_grad_()
        with FREEZER.freeze_circuits(model, [config] if frozen else [strength_zero(config)]):
            model(inputs_embeds=embeds, use_cache=False).logits.square().mean().backward()
        assert embeds.grad is not None
        found.append(embeds.grad)
    tell(f"{folder} gradient", found[0], found[2], found[1], 1e-4 * float(found[1].abs().max()))


def sweeps(folder: str, spread: Any, whole: Any) -> None:
    """The scores of all heads, each process taking part in every pass."""
    bound = 2 * plain_freeze(whole, config_of("zero", whole)).bound  # of a difference of two logits
    asked: dict[str, Any] = {"targets": (5, 7), "circuits": ("qk", "ov", "z"), "progress": False}
    for positions, scope in product(("last", "all"), ("group", "head")):
        tables = [
            torch.stack(
                [
                    *score_heads(
                        model, IDS, "logit_difference", positions=positions, kv_scope=scope, **asked
                    ).scores.values()
                ]
            )
            for model in (spread, whole)
        ]
        tell(f"{folder} sweep {positions} {scope}", tables[0], torch.zeros_like(tables[0]), tables[1], bound)


def recordings(folder: str, spread: Any, whole: Any) -> None:
    """The heads of all processes, where each has its own only."""
    found, wanted = (
        torch.cat([getattr(FREEZER.record(model, IDS)[0], role).flatten() for role in ("q", "k", "v", "z")])
        for model in (spread, whole)
    )
    tell(f"{folder} recording", found, torch.zeros_like(found), wanted, 1e-5 * float(wanted.abs().max()))


def strength_zero(config: InterventionConfig) -> InterventionConfig:
    """A freeze that leaves everything as it is."""
    return InterventionConfig(config.layer_indices, config.head_indices, strength=0.0)


def refusals(folder: str, spread: Any) -> None:
    """Passes are not shared out among processes that run each of them together; patterns of all heads are nowhere."""
    with pytest.raises(
        UnsupportedModelError, match=r"spread over the processes \[0, 1\], which run each pass together"
    ):
        score_heads(spread, IDS, "kl", progress=False, distributed=True)
    with pytest.raises(UnsupportedModelError, match=r"checkpoint: the model is spread over the processes \[0, 1\]"):
        score_heads(spread, IDS, "kl", progress=False, checkpoint=f"{folder}.sweep")
    if "llama" in folder or "qwen" in folder:
        with pytest.raises(UnsupportedModelError, match="own heads only"):
            FREEZER.record(spread, IDS, pattern=True)


if __name__ == "__main__":
    main(sys.argv[1:])
