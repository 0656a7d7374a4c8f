"""Tensor parallelism: each of two processes holds half of the heads, and freezes those of its own that were chosen.

transformers spreads a projection either so that a process sees its own heads' features only (LLaMA, Qwen 3) or so that
what all of them give is gathered (Phi-3, OLMo 2); both are run, by torchrun on the CPU with gloo.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from freeze_core import UnsupportedModelError
from freeze_core.attention.shards import Shard, shard_of
from pytest_circuitfreeze.models import tiny_model
from pytest_circuitfreeze.shrinking import tiny_of_type

WORKER = Path(__file__).with_name("tensor_parallel_worker.py")
CASES = 3 * 2 * 3 + 3 + 1 + 2 * 2 + 1
"""What the worker tells of each model."""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    models = {name: tiny_model(name) for name in ("llama_gqa", "phi3")}
    models |= {name: tiny_of_type(name) for name in ("qwen3", "olmo2")}
    folder = tmp_path_factory.mktemp("spread")
    for name, model in models.items():
        model.save_pretrained(folder / name)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER)]
    run = subprocess.run([*command, *models], cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("name", ["llama_gqa", "phi3", "qwen3", "olmo2"])
def test_two_processes_give_what_one_does(told: list[dict[str, object]], name: str) -> None:
    mine = [one for one in told if str(one["case"]).split()[0] == name]
    assert len(mine) == CASES
    for one in mine:
        assert one["error"] <= one["bound"], one
        assert one["effect"] > 2 * one["bound"], one


class Shards:
    """Stands in for a placement of a `DTensor`: along `dim`, or whole on every process."""

    def __init__(self, dim: int | None) -> None:
        self.dim = dim

    def is_replicate(self) -> bool:
        return self.dim is None


class Placement(Shards):
    """One stretch a process, under the name that torch gives it."""


Placement.__name__ = "Shard"


def spread(*placements: Shards) -> SimpleNamespace:
    """Stands in for a projection that is spread over three processes, of which this is the last."""
    mesh = SimpleNamespace(size=lambda axis: 3, get_local_rank=lambda axis: 2)
    return SimpleNamespace(weight=SimpleNamespace(device_mesh=mesh, placements=placements))


def test_uneven_stretches() -> None:
    """The last process has what is left."""
    assert shard_of(spread(Placement(0)), 0, 32) == Shard(22, 32, 32)
    assert shard_of(spread(Placement(1)), 0, 32) is None
    assert shard_of(spread(Placement(None)), 0, 32) is None


@pytest.mark.parametrize("placements", [(Shards(0),), (Placement(0), Placement(0))])
def test_heads_in_several_stretches_are_refused(placements: tuple[Shards, ...]) -> None:
    with pytest.raises(UnsupportedModelError, match="one stretch a process"):
        shard_of(spread(*placements), 0, 32)
