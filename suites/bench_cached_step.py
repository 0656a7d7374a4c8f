"""A frozen step of cached decoding beside a plain one, by the engine, by hand, and by each installed peer."""

from __future__ import annotations

from collections.abc import Callable
from time import process_time
from typing import TYPE_CHECKING, Any

import pytest
from torch import Tensor
from transformers import Cache

from pytest_circuitfreeze.engines import Engine
from pytest_circuitfreeze.suites.paired import Call
from pytest_circuitfreeze.suites.side_by_side import circuits, side_by_side, sizes

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture


@pytest.mark.benchmark(group="cached step", timer=process_time)
@circuits
@sizes
def bench_cached_step(benchmark: BenchmarkFixture, circuit_engine: Engine, size: str, circuit: str) -> None:
    """One token after a prompt whose keys and values are cached; the cache is cut back after each."""
    side_by_side(benchmark, circuit_engine, size, circuit, cached_step)


def cached_step(call: Callable[..., Any], prompt: Tensor) -> Call:
    """A call that runs one token more, always the same."""
    output = call(input_ids=prompt, use_cache=True)
    # A model takes a cache by the name under which it returns one.
    name, cache = next((name, value) for name, value in output.items() if isinstance(value, Cache))
    token = prompt[:, :1]

    def step() -> None:
        call(input_ids=token, use_cache=True, **{name: cache})
        cache.crop(-1)

    return step
