"""The identity of a model that is offloaded, sharded or has adapters is that of what it computes with.

What these need is the extra `conditions`, which CI installs; without it they say that it is missing.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_freeze import FREEZER, IDS
from test_offloading import OFFLOADS

from freeze_core import InterventionConfig, InterventionError, score_heads
from freeze_core.attention.sites import find_sites
from freeze_core.identity import model_identity
from pytest_circuitfreeze.models import tiny_model

peft = pytest.importorskip("peft", reason="the extra 'conditions' is not installed")

# peft asks for what newer versions of transformers call otherwise.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

WORKER = Path(__file__).with_name("identity_worker.py")


def identity(model: Any) -> str:
    return model_identity(find_sites(model))


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa"])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_statistics_hold_wherever_weights_lie(offload: str, name: str, tmp_path: Path) -> None:
    whole = tiny_model(name)
    offloaded = OFFLOADS[offload](tiny_model(name), tmp_path / "one")
    other = tiny_model(name, seed=1)
    for source, target in ((whole, offloaded), (offloaded, whole)):
        statistics = FREEZER.calibrate(source, [IDS], progress=False)
        config = InterventionConfig([0], [1], "ov", "mean", statistics=statistics)
        FREEZER.freeze_circuits(target, config).remove()
        with pytest.raises(InterventionError, match="of another model"):
            FREEZER.freeze_circuits(other, config)
    with pytest.raises(InterventionError, match="of another model"):
        FREEZER.freeze_circuits(OFFLOADS[offload](other, tmp_path / "other"), config)


def test_an_edit_of_offloaded_weights_makes_another_model(tmp_path: Path) -> None:
    model = OFFLOADS["cpu"](tiny_model("llama_gqa"), tmp_path)
    before = identity(model)
    hook: Any = model.model.layers[1].mlp.up_proj._hf_hook
    hook.weights_map["weight"][3, 5] += 1
    assert identity(model) != before


def test_a_checkpoint_of_another_offloaded_model_is_refused(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"layers": [1], "circuits": ["ov"], "progress": False, "checkpoint": tmp_path / "sweep"}
    for place in ("one", "again"):
        score_heads(OFFLOADS["disk"](tiny_model("gpt2"), tmp_path / place), IDS, "loss", **asked)
    with pytest.raises(InterventionError, match="there and here: model's parameters"):
        score_heads(OFFLOADS["disk"](tiny_model("gpt2", seed=1), tmp_path / "other"), IDS, "loss", **asked)


def test_adapters_count_while_they_are_in_effect() -> None:
    base = identity(tiny_model("llama_gqa"))
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_model("llama_gqa"), config)
    added = identity(model)
    assert added != base
    with model.disable_adapter():
        assert identity(model) == base
    assert identity(model) == added
    model.add_adapter("idle", config)
    assert identity(model) == added
    model.set_adapter("idle")
    other = identity(model)
    assert other not in (base, added)
    model.set_adapter("default")
    for module in model.modules():
        if hasattr(module, "adapter_layer_names"):
            module.scaling["default"] *= 2
    scaled = identity(model)
    assert scaled not in (base, added, other)
    model.merge_adapter()
    merged = identity(model)
    assert merged not in (base, added, other, scaled)
    assert identity(model.unload()) == merged


def test_an_adapter_that_was_taken_out_leaves_the_model_that_it_was_put_into() -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("llama_gqa"), config)
    assert identity(model.unload()) == identity(tiny_model("llama_gqa"))


def test_a_sharded_model_is_the_whole_one(tmp_path: Path) -> None:
    tiny_model("llama_gqa").save_pretrained(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER)]
    run = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
