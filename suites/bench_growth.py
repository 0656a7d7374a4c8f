"""What a frozen forward costs beside a plain one as layers, heads, rows and tokens grow; the rest as in `tiny`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from time import process_time
from typing import TYPE_CHECKING

import pytest
import torch

from freeze_core import InterventionConfig
from pytest_circuitfreeze.engines import Engine
from pytest_circuitfreeze.suites.contenders import BY_HAND, Freeze, contenders
from pytest_circuitfreeze.suites.paired import Call, Pairs
from pytest_circuitfreeze.suites.sizes import gpt2, ids
from pytest_circuitfreeze.threads import one_thread

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

ROUNDS = 12
SHAPE = {"layers": 2, "heads": 4, "rows": 1, "tokens": 16}
GROWN = [("layers", 4), ("layers", 8), ("heads", 8), ("heads", 16), ("rows", 4), ("rows", 16), ("tokens", 64)]


@pytest.mark.benchmark(group="growth", timer=process_time)
@pytest.mark.parametrize(("what", "number"), [*SHAPE.items(), *GROWN])
def bench_growth(benchmark: BenchmarkFixture, circuit_engine: Engine, what: str, number: int) -> None:
    """QK of half of the heads at zero, in every layer."""
    shape = SHAPE | {what: number}
    model = gpt2(n_layer=shape["layers"], n_head=shape["heads"], n_embd=64, n_positions=128, vocab_size=1000)
    call = partial(model, input_ids=ids(model, shape["tokens"], shape["rows"]))
    config = InterventionConfig(head_indices=list(range(shape["heads"] // 2)), circuit="qk")
    freezes, _ = contenders(circuit_engine, model, config)

    @contextmanager
    def frozen(freeze: Freeze) -> Iterator[Call]:
        with freeze():
            yield call

    with one_thread(), torch.no_grad():
        compared = {name: partial(frozen, freezes[name]) for name in (circuit_engine.name, *BY_HAND)}
        pairs = Pairs(call, compared)
        pairs.rounds(ROUNDS)
        with frozen(freezes[circuit_engine.name]) as own:
            benchmark.pedantic(own, rounds=ROUNDS)
    benchmark.extra_info.update(
        row=f"{number} {what}", engine=circuit_engine.name, ratios=pairs.spreads(), target=None, missing={}
    )
