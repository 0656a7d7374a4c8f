"""Exact scores of every head beside as many plain forwards as there are scores, and beside sweeps by others."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from statistics import median
from time import process_time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import PreTrainedModel

from freeze_core import InterventionConfig, score_heads
from pytest_circuitfreeze.engines import Engine
from pytest_circuitfreeze.suites.contenders import BY_HAND, contenders
from pytest_circuitfreeze.suites.paired import spread
from pytest_circuitfreeze.suites.side_by_side import built
from pytest_circuitfreeze.suites.sizes import ids
from pytest_circuitfreeze.threads import one_thread

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

ROUNDS = 5
TOKENS = {"tiny": 16, "gpt2_small": 64}
TARGETS = {"last": 0.37, "all": 0.70}
METRICS = {"last": "probability", "all": "loss"}
SAMPLED = 12
"""Heads that a sweep of one forward each is timed on: its forwards all cost the same."""


@pytest.mark.benchmark(group="sweep of all heads", timer=process_time)
@pytest.mark.parametrize("positions", TARGETS)
@pytest.mark.parametrize("size", TOKENS)
def bench_sweep(benchmark: BenchmarkFixture, circuit_engine: Engine, size: str, positions: str) -> None:
    """QK and OV of every head, each alone at zero, on one row. `score_heads` is freeze_core's, whatever the engine."""
    model: PreTrainedModel = built(size)
    prompt = ids(model, TOKENS[size])
    heads = [(layer, head) for layer in range(model.config.n_layer) for head in range(model.config.n_head)]
    sampled = heads[:: max(1, len(heads) // SAMPLED)]
    plain = partial(model, input_ids=prompt)
    sweep = partial(
        score_heads, model, prompt, METRICS[positions], positions=positions, progress=False, **_targets(positions)
    )
    times: dict[str, list[float]] = {}

    def measured() -> None:
        for name, (sweeps, forwards) in swept.items():
            around = [timed(plain) for _ in range(SAMPLED)]
            took = timed(sweeps)
            around += [timed(plain) for _ in range(SAMPLED)]
            times.setdefault(name, []).append(took / (forwards * median(around)))

    with one_thread(), torch.no_grad():
        naive: dict[str, list[Callable[[], AbstractContextManager[Any]]]] = {}
        for layer, head in sampled:
            config = InterventionConfig([layer], [head], circuit="ov")
            found, missing = contenders(circuit_engine, model, config)
            for name, freeze in found.items():
                if name not in BY_HAND[1:]:
                    naive.setdefault(name, []).append(freeze)
        swept = {"score_heads": (sweep, 2 * len(heads))} | {
            name: (partial(one_by_one, freezes, prompt), len(freezes)) for name, freezes in naive.items()
        }
        benchmark.pedantic(plain, setup=measured, rounds=ROUNDS)
    ratios = {name: spread(values) for name, values in times.items()}
    benchmark.extra_info.update(
        row=f"{size}, {positions}", engine="score_heads", ratios=ratios, target=TARGETS[positions], missing=missing
    )


def one_by_one(freezes: list[Callable[[], AbstractContextManager[Any]]], prompt: torch.Tensor) -> None:
    """A forward of its own under each freeze."""
    for freeze in freezes:
        with freeze() as call:
            call(input_ids=prompt)


def timed(call: Callable[[], object]) -> float:
    """CPU seconds."""
    start = process_time()
    call()
    return process_time() - start


def _targets(positions: str) -> dict[str, Any]:
    return {"targets": 5} if positions == "last" else {}
