"""What a freeze of the chosen models costs beside a plain forward: a frozen one, and putting a freeze on and off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import PreTrainedModel

from pytest_circuitfreeze.engines import Engine
from pytest_circuitfreeze.fixtures import refusal
from pytest_circuitfreeze.settings import settings_of
from pytest_circuitfreeze.suites.paired import Call, Pairs
from pytest_circuitfreeze.suites.sizes import ids
from pytest_circuitfreeze.threads import one_thread

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

    from freeze_core import InterventionConfig

TOKENS, ROUNDS = 64, 30

FREEZES: dict[str, dict[str, Any]] = {
    "one_head_ov_zero": {"layer_indices": [0], "head_indices": [0], "circuit": "ov"},
    "all_layers_qk_mean": {"head_indices": [0], "circuit": "qk", "freeze_type": "mean"},
    "all_layers_both_noise_head": {"head_indices": [0], "freeze_type": "noise", "kv_scope": "head"},
}
freezes = pytest.mark.parametrize("freeze", FREEZES)


@pytest.mark.benchmark(group="frozen forward", timer=process_time)
@freezes
def bench_frozen_forward(
    benchmark: BenchmarkFixture,
    circuit_engine: Engine,
    circuit_model: PreTrainedModel,
    freeze: str,
    request: pytest.FixtureRequest,
) -> None:
    """A frozen forward without gradients, between plain ones of the same model, unfrozen."""
    _skip_refused(circuit_engine, circuit_model)
    forward, clock = _forward(circuit_model)
    limit = settings_of(request.config).bench_limit

    @contextmanager
    def frozen() -> Iterator[Call]:
        with circuit_engine.freeze(circuit_model, _config(freeze)) as call:
            yield partial(forward, call)

    with one_thread(), torch.no_grad():
        pairs = Pairs(partial(forward, circuit_model), {circuit_engine.name: frozen}, clock=clock)
        pairs.rounds(ROUNDS)
        with frozen() as own:
            benchmark.pedantic(own, rounds=ROUNDS)
    _describe(benchmark, request, circuit_engine, pairs, limit)
    found = benchmark.extra_info["ratios"][circuit_engine.name]
    if limit is not None and found["low"] > limit:
        pytest.fail(
            f"a forward under {freeze} costs {found['median']:.3f} [{found['low']:.3f}, {found['high']:.3f}] of a "
            f"plain one in {found['n']} rounds; the limit is {limit:g}",
            pytrace=False,
        )


@pytest.mark.benchmark(group="install and remove", timer=process_time)
@freezes
def bench_install_and_remove(
    benchmark: BenchmarkFixture,
    circuit_engine: Engine,
    circuit_model: PreTrainedModel,
    freeze: str,
    request: pytest.FixtureRequest,
) -> None:
    """Putting a freeze on and taking it off again, without a forward, between plain forwards."""
    _skip_refused(circuit_engine, circuit_model)
    forward, clock = _forward(circuit_model)

    def install_and_remove() -> None:
        with circuit_engine.freeze(circuit_model, _config(freeze)):
            pass

    with one_thread(), torch.no_grad():
        plain = partial(forward, circuit_model)
        pairs = Pairs(plain, {circuit_engine.name: lambda: nullcontext(install_and_remove)}, clock=clock)
        pairs.rounds(ROUNDS)
        benchmark.pedantic(install_and_remove, rounds=ROUNDS)
    _describe(benchmark, request, circuit_engine, pairs, None)


def _skip_refused(engine: Engine, model: PreTrainedModel) -> None:
    """What an engine refuses, as a claim of the suites has seen, costs nothing."""
    reason = refusal(engine, model)
    if reason is not None:
        pytest.skip(f"refused: {reason}")


def _config(freeze: str) -> InterventionConfig:
    from freeze_core import InterventionConfig

    return InterventionConfig(**FREEZES[freeze])


def _forward(model: PreTrainedModel) -> tuple[Callable[[Callable[..., Any]], object], Callable[[], float]]:
    """A forward by any callable that is the model, and the clock that sees what it costs."""
    prompt = ids(model, TOKENS)
    if model.device.type == "cpu":
        return lambda call: call(input_ids=prompt), process_time

    def forward(call: Callable[..., Any]) -> None:
        call(input_ids=prompt.to(model.device))
        torch.accelerator.synchronize(model.device)

    return forward, perf_counter


def _describe(
    benchmark: BenchmarkFixture, request: pytest.FixtureRequest, engine: Engine, pairs: Pairs, target: float | None
) -> None:
    """What the report says of it."""
    chosen = request.node.callspec.params
    benchmark.extra_info.update(
        row=f"{chosen['circuit_model']}, {chosen['freeze'].replace('_', ' ')}, {TOKENS} tokens",
        engine=engine.name,
        ratios=pairs.spreads(),
        target=target,
        missing={},
    )
