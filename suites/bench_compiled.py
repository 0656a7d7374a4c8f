"""What torch.compile has to do under a freeze: graph breaks, and graphs made anew for another one of the same sites."""

from __future__ import annotations

from time import process_time
from typing import TYPE_CHECKING, Any

import pytest
import torch

from freeze_core import InterventionConfig
from pytest_circuitfreeze.engines import Engine
from pytest_circuitfreeze.suites.sizes import ids, tiny

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

CHANGES: dict[str, list[dict[str, Any]]] = {
    "the same again": [{}, {}, {}],
    "other heads": [{"head_indices": heads} for heads in ([0, 3], [2, 3], [0])],
    "another strength": [{"strength": strength} for strength in (0.25, 0.75, 0.1)],
    "other values": [{"noise_std": std} for std in (2.0, 0.25, 3.0)],
    "another seed": [{"seed": seed} for seed in (1, 2, 3)],
}
"""Three freezes each, one after the other, of the same sites as a first one."""


@pytest.mark.benchmark(group="graphs under torch.compile", timer=process_time)
@pytest.mark.parametrize("change", CHANGES)
def bench_recompiles(benchmark: BenchmarkFixture, circuit_engine: Engine, change: str) -> None:
    """How many graphs three freezes take that a first one of the same sites has not made; and graph breaks."""
    from torch._dynamo.utils import counters

    model = tiny()
    prompt = ids(model, 16)
    first: dict[str, Any] = {"head_indices": [1, 2], "freeze_type": "noise", "noise_std": 1.0, "strength": 0.5}
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(model, backend="eager")

    def frozen(fields: dict[str, Any]) -> int:
        with torch.no_grad(), circuit_engine.freeze(model, InterventionConfig(**fields)):
            traced, wanted = (run(input_ids=prompt, use_cache=False).logits for run in (compiled, model))
        assert torch.allclose(traced, wanted, atol=1e-5), f"compiled, {fields} is not in force"
        return int(counters["stats"]["unique_graphs"])

    try:
        before = frozen(first)
        assert before >= 1, "nothing was compiled"
        made = [frozen({**first, **changed}) for changed in CHANGES[change]][-1] - before
        breaks = sum(counters["graph_break"].values())
    finally:
        torch.compiler.reset()
    benchmark.pedantic(lambda: None)
    ratios = {
        name: {"median": number, "low": number, "high": number, "n": 1}
        for name, number in (("graphs made anew", made), ("graph breaks", breaks))
    }
    benchmark.extra_info.update(row=change, engine="graphs made anew", ratios=ratios, target=0, missing={})
