"""DTensor weights and activations: FSDP2, transformers' tp_plan, and torch's own parallelize_module.

Two processes compare every result of a sharded model with that of the whole one, by torchrun on the CPU with gloo.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_circuitfreeze.models import tiny_model

WORKER = Path(__file__).with_name("dtensor_worker.py")
ROUNDING = 64 * torch.finfo(torch.float32).eps
"""Sums over the processes are taken in another order: in parts of the largest number."""
CASES = 12 + 1 + 3 + 12
"""Freezes of query, key and value by freeze type and KV scope, of z, gradients, and instruments."""
NEEDS_ALL_HEADS = {
    "pattern": "the patterns of model.layers.0.self_attn are sharded",
    "head_circuits": "a process forms those of its own heads only; use a model that is not sharded",
    "copying_scores": "a process forms those of its own heads only; use a model that is not sharded",
}
"""Refused where a process has the patterns of its own heads only, and by what words."""
REFUSED = {
    "fsdp2": {},
    "fsdp2 alone": {},
    "parallelized alone": {},
    "tp_plan": {**NEEDS_ALL_HEADS, "score_heads attribution": "a process sees its own heads only; use method='exact'"},
    "parallelized": NEEDS_ALL_HEADS,
    "heads_gathered": {
        "head_circuits": "the output projection of model.layers.0.self_attn has 16 features where 32 were expected",
        "copying_scores": "the output projection of model.layers.0.self_attn has 16 features where 32 were expected",
    },
    "sequence_parallel": {
        **NEEDS_ALL_HEADS,
        "head_circuits": "use fold_norm=False",
        "vector": "its columns are not those of the tokens",
    },
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sharded")
    tiny_model("llama_gqa").save_pretrained(folder / "llama_gqa")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER)]
    run = subprocess.run([*command, "llama_gqa"], cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("variant", REFUSED)
def test_a_sharded_model_gives_the_results_of_the_whole_one(results: list[dict[str, Any]], variant: str) -> None:
    lines = [line for line in results if line["variant"] == variant]
    assert len(lines) == CASES
    for line in lines:
        if line["case"] in REFUSED[variant]:
            assert REFUSED[variant][line["case"]] in line["refused"], line
        else:
            assert line.get("error", torch.inf) <= ROUNDING * max(1.0, line["size"]), line


def test_a_projection_whose_tokens_are_sharded_cannot_be_frozen(results: list[dict[str, Any]]) -> None:
    lines = [line for line in results if line["variant"] == "tokens_split"]
    assert len(lines) == 12 + 1
    for line in lines:
        if line["case"] == "freeze z":  # whose output projection is not sharded
            assert line["error"] <= ROUNDING * line["size"], line
        else:
            assert "q_proj of model.layers.0.self_attn" in line["refused"], line
            assert "only Replicate and Shard of the last dimension are supported" in line["refused"], line
