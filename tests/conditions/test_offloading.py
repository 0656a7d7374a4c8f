"""accelerate moves weights in and out around each module's forward: the freeze lies on top of that, or beneath.

What these need is the extra `conditions`, which CI installs; without it they say that it is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_freeze import FREEZER, IDS, agrees, config_of, frozen_logits, logits, plain
from torch import nn

from freeze_core import FreezeNotInForceError, copying_scores, head_circuits, pattern_scores, score_heads
from freeze_core.scoring import batch_passes
from pytest_circuitfreeze.models import tiny_model
from pytest_circuitfreeze.shrinking import tiny_of_type

accelerate = pytest.importorskip("accelerate", reason="the extra 'conditions' is not installed")

Offload = Callable[[Any, Path], Any]


def cpu_offload(model: Any, folder: Path) -> Any:
    return accelerate.cpu_offload(model, execution_device="cpu")


def disk_offload(model: Any, folder: Path) -> Any:
    return accelerate.disk_offload(model, str(folder), execution_device="cpu")


def device_map(model: Any, folder: Path) -> Any:
    """Each block of the middle layer on the disk, the rest on the CPU."""
    places = {
        name: "disk" if {"1"} & set(name.split(".")) else "cpu"
        for name, module in model.named_modules()
        if name and not list(module.children())
    }
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


OFFLOADS: dict[str, Offload] = {"cpu": cpu_offload, "disk": disk_offload, "device_map": device_map}


def hooks_of(model: nn.Module) -> dict[str, list[str]]:
    """The attributes of every module: what accelerate has put on it, and nothing of a freeze."""
    return {name: sorted(vars(module)) for name, module in model.named_modules()}


@pytest.mark.parametrize("freeze_type", ["zero", "mean", "noise", "reference", "resample"])
@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "falcon_mqa"])
def test_offloaded_before_the_freeze(name: str, offload: str, freeze_type: str, tmp_path: Path) -> None:
    config, wanted = plain(name, freeze_type, kv_scope="head")
    model = OFFLOADS[offload](tiny_model(name), tmp_path)
    before, unfrozen = hooks_of(model), logits(model)
    assert any("_hf_hook" in attributes for attributes in before.values()), "accelerate has hooked nothing"
    agrees(frozen_logits(model, config), unfrozen, wanted)
    assert hooks_of(model) == before
    assert torch.equal(logits(model), unfrozen)


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "falcon_mqa"])
def test_offloaded_under_the_freeze(name: str, offload: str, tmp_path: Path) -> None:
    """The freeze is then beneath accelerate's hooks, goes on, takes another one, and is taken out from there."""
    config, wanted = plain(name, "mean", kv_scope="head")
    whole = tiny_model(name)
    both = [config, config_of("noise_std", whole, head_indices=[2], kv_scope="head")]
    with FREEZER.freeze_circuits(whole, both):
        wanted_of_both = logits(whole)
    model, unfrozen = tiny_model(name), logits(whole)
    with FREEZER.freeze_circuits(model, config):
        model = OFFLOADS[offload](model, tmp_path)
        agrees(logits(model), unfrozen, wanted)
        with FREEZER.freeze_circuits(model, both[1]):
            assert torch.equal(logits(model), wanted_of_both)
        agrees(logits(model), unfrozen, wanted)
    assert torch.equal(logits(model), unfrozen)
    assert hooks_of(model) == hooks_of(OFFLOADS[offload](tiny_model(name), tmp_path / "again"))


@pytest.mark.parametrize("positions", ["last", "all"])
@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "falcon_mqa"])
def test_an_offloaded_model_is_swept_where_it_lies(
    name: str, offload: str, positions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The products are those of the plain model, so the scores are its bits; a layer that is left out is not loaded."""
    monkeypatch.setattr(batch_passes, "foreign_code", lambda model: None)  # hooks count here
    asked: dict[str, Any] = {"circuits": ("qk", "ov", "z"), "positions": positions, "progress": False}
    expected = score_heads(tiny_model(name), IDS, "loss", targets=5, **asked)
    model = OFFLOADS[offload](tiny_model(name), tmp_path)
    before, runs = hooks_of(model), list[nn.Module]()
    first, last = [one for path, one in model.named_modules() if path.endswith("mlp")][::2]
    for mlp in (first, last):
        mlp.register_forward_hook(lambda module, args, output: runs.append(module))
    found = score_heads(model, IDS, "loss", targets=5, **asked)
    assert found.clean == expected.clean
    assert all(torch.equal(found.scores[circuit], expected.scores[circuit]) for circuit in asked["circuits"])
    assert all(float(scores.abs().min()) > 0 for scores in found.scores.values())
    assert hooks_of(model) == before
    freezes = runs.count(first) - 4
    assert runs.count(last) == 5 + 1 + 2 + freezes, "once for the freezes of each of two layers, and its own"


@pytest.mark.parametrize("scope", ["group", "head"])
def test_offloading_undone_under_a_freeze(scope: str, tmp_path: Path) -> None:
    """accelerate puts back the forwards that it found, and with them takes out the freeze: an error, not a no-op."""
    config, wanted = plain("llama_gqa", "zero", kv_scope=scope)
    unfrozen = logits(tiny_model("llama_gqa"))
    model = cpu_offload(tiny_model("llama_gqa"), tmp_path)
    frozen = FREEZER.freeze_circuits(model, config)
    accelerate.hooks.remove_hook_from_submodules(model)
    with pytest.raises(FreezeNotInForceError, match=r"an offloading undone, say\): remove the freeze, then freeze"):
        logits(model)
    frozen.remove()
    frozen.remove()
    assert torch.equal(logits(model), unfrozen)
    agrees(frozen_logits(model, config), unfrozen, wanted)
    assert torch.equal(logits(model), unfrozen)


def test_offloading_undone_of_every_module_at_once_is_told_when_the_freeze_is_removed() -> None:
    """Nothing is left that a pass could notice it by."""
    config, wanted = plain("llama", "zero")
    unfrozen = logits(tiny_model("llama"))
    model = tiny_model("llama")
    accelerate.dispatch_model(model, {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)
    frozen = FREEZER.freeze_circuits(model, config)
    assert not torch.equal(logits(model), unfrozen)
    accelerate.hooks.remove_hook_from_submodules(model)
    with pytest.raises(FreezeNotInForceError, match=r"layers\.2\.self_attn: something else had put the forwards back"):
        frozen.remove()
    frozen.remove()
    assert torch.equal(logits(model), unfrozen)
    agrees(frozen_logits(model, config), unfrozen, wanted)


def test_offloading_undone_where_attention_has_weights_of_its_own(tmp_path: Path) -> None:
    """There accelerate takes the freeze out of the attention itself, so that only the pass can tell."""
    unfrozen = logits(tiny_of_type("gpt_oss", attn="eager"))
    model = cpu_offload(tiny_of_type("gpt_oss", attn="eager"), tmp_path)
    frozen = FREEZER.freeze_circuits(model, config_of("zero", model))
    accelerate.hooks.remove_hook_from_submodules(model)
    with pytest.raises(FreezeNotInForceError, match="what runs is not frozen"):
        logits(model)
    frozen.remove()
    assert torch.equal(logits(model), unfrozen)
    with FREEZER.freeze_circuits(model, config_of("zero", model)):
        assert not torch.equal(logits(model), unfrozen)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_circuits_of_what_is_offloaded(offload: str, tmp_path: Path) -> None:
    plain_model, model = tiny_model("llama_gqa"), OFFLOADS[offload](tiny_model("llama_gqa"), tmp_path)
    before = hooks_of(model)
    found, wanted = (head_circuits(one, 1, 3, offsets=[2], fold_norm=True) for one in (model, plain_model))
    assert torch.equal(found.qk(2).matrix(), wanted.qk(2).matrix())
    assert torch.equal(found.ov.matrix(), wanted.ov.matrix())
    scores = [copying_scores(one).values["copying"] for one in (model, plain_model)]
    assert torch.equal(*scores)
    measures = [pattern_scores(one, 5, 2, progress=False, resamples=100) for one in (model, plain_model)]
    assert torch.equal(*(one.values["previous_token"] for one in measures))
    assert hooks_of(model) == before
