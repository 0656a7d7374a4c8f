"""A frozen pass over a prompt beside a plain one, by the engine, by hand, and by each installed peer."""

from __future__ import annotations

from functools import partial
from time import process_time
from typing import TYPE_CHECKING

import pytest

from pytest_circuitfreeze.engines import Engine
from pytest_circuitfreeze.suites.side_by_side import circuits, side_by_side, sizes

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture


@pytest.mark.benchmark(group="forward", timer=process_time)
@circuits
@sizes
def bench_forward(benchmark: BenchmarkFixture, circuit_engine: Engine, size: str, circuit: str) -> None:
    """A whole prompt in one pass, that makes a cache."""
    side_by_side(benchmark, circuit_engine, size, circuit, lambda call, prompt: partial(call, input_ids=prompt))
