"""One of the processes of `test_shared_sweeps.py`, which starts several by torchrun: what each of them finds.

Each writes what came of every case into a file of its own in the folder that it is given.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from freeze_core import HeadScores, score_heads
from freeze_core.scoring import batch_passes
from pytest_circuitfreeze.models import tiny_model

IDS = torch.arange(14).view(2, 7) * 5 % 97
BATCHES = [IDS, IDS[:1, :5], IDS + 3]
MODELS = ("gpt2", "llama_gqa")
CASES: dict[str, dict[str, Any]] = {
    "last": {"metric": "logit_difference", "targets": (5, 7), "positions": "last"},
    "all": {"metric": "loss", "circuits": ("ov", "z"), "kv_scope": "group"},
    "odd": {"metric": "kl", "layers": [0, 2], "circuits": ("qk",), "inputs": IDS, "positions": [3, 1]},
}


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """How often the projection to the MLP of each layer runs: the passes of that layer."""
    layers = [one for name, one in model.named_modules() if name.endswith(("mlp.c_fc", "mlp.up_proj"))]
    counts = [0] * len(layers)

    def count(number: int) -> Callable[..., None]:
        def hook(*given: object) -> None:
            counts[number] += 1

        return hook

    hooks = [layer.register_forward_hook(count(number)) for number, layer in enumerate(layers)]
    foreign_code, batch_passes.foreign_code = batch_passes.foreign_code, lambda model: None  # these hooks only count
    yield counts
    batch_passes.foreign_code = foreign_code
    for hook in hooks:
        hook.remove()


def scored(model: nn.Module, **fields: Any) -> HeadScores:
    return score_heads(model, **{"inputs": BATCHES, "progress": False, **fields})


def table(found: HeadScores) -> dict[str, Any]:
    """The bits of a table as JSON."""
    scores = {name: values.nan_to_num(7e7).view(torch.int64).tolist() for name, values in found.scores.items()}
    return {"scores": scores, "clean": found.clean.hex()}


def raised(model: nn.Module, **fields: Any) -> str:
    try:
        scored(model, distributed=True, **fields)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


class Stops:
    """A metric that raises in one process when it is taken for the 15th time."""

    __qualname__ = __name__ = "spread"

    def __init__(self, rank: int, error: type[BaseException] | None = None) -> None:
        self.error = error if dist.is_initialized() and dist.get_rank() == rank else None
        self.calls = 0

    def __call__(self, logits: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 15 and self.error:
            raise self.error("stopped")
        return logits[..., 5].sum(1) - logits[..., 7].sum(1)


def shared(rank: int) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for name in MODELS:
        for case, fields in CASES.items():
            model = tiny_model(name)
            with counted(model) as counts:
                told[f"{name} {case}"] = {"table": table(scored(model, distributed=True, **fields)), "counts": counts}
    return told


def drawing() -> nn.Module:
    """A model in training, which draws dropout."""
    model = tiny_model("gpt2").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    return model


def refused(rank: int) -> dict[str, str]:
    model, other = tiny_model("gpt2"), tiny_model("gpt2")
    with torch.no_grad():
        other.transformer.h[0].mlp.c_fc.weight[0, 0] += rank
    noisy = tiny_model("gpt2")
    noisy.transformer.ln_f.register_forward_hook(lambda module, args, output: output * (1 + rank / 100))
    cases: dict[str, tuple[Any, dict[str, Any]]] = {
        "inputs": (model, {"inputs": IDS + rank}),
        "model": (other, {}),
        "hooks": (noisy, {}),
        "draws": (drawing(), {}),
        "metric": (model, {"metric": ("kl", "loss")[rank]}),
        "argument": (model, {"strength": 1.0 + rank}),
        "method": (model, {"method": ("exact", "guess")[rank]}),
        "error": (model, {"metric": Stops(1, ZeroDivisionError)}),
        "memory": (model, {"metric": Stops(0, torch.OutOfMemoryError)}),
        "wrapped": (nn.parallel.DistributedDataParallel(tiny_model("gpt2")), {}),
    }
    torch.manual_seed(rank)
    return {name: raised(model, **{"metric": "kl", **fields}) for name, (model, fields) in cases.items()}


def stopped(rank: int, folder: Path) -> dict[str, Any]:
    """A sweep in which one process is stopped, then goes on, together and in one process."""
    told: dict[str, Any] = {}
    for name, at in (("first", 0), ("second", 1)):
        fields: dict[str, Any] = {"positions": "last", "checkpoint": folder / f"stopped in {name}"}
        told[name] = {"raised": raised(tiny_model("gpt2"), metric=Stops(at, KeyboardInterrupt), **fields)}
        again = Stops(at)
        found = scored(tiny_model("gpt2"), metric=again, distributed=True, **fields)
        told[name] |= {"table": table(found), "calls": again.calls}
    return told


def left_alone(rank: int) -> str:
    """What a process is told when the other one ends in the middle of it without a word."""

    def leaves(logits: Tensor) -> Tensor:
        if rank == 1:
            os._exit(0)
        return logits[:, 0, 0]

    return raised(tiny_model("gpt2"), metric=leaves)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    told = {"shared": shared(rank)}
    file = folder / f"{rank}.json"
    if dist.get_world_size() == 2:
        group = [dist.new_group([one]) for one in range(2)][rank]
        alone = scored(tiny_model("gpt2"), distributed=group, **CASES["last"])
        told |= {"refused": refused(rank), "stopped": stopped(rank, folder), "alone": {"table": table(alone)}}
        file.write_text(json.dumps(told))
        told["left alone"] = left_alone(rank)
    file.write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
