"""Installing and removing a freeze beside hooks by hand, and the memory that a freeze holds."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from time import process_time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import PreTrainedModel

from freeze_core import InterventionConfig
from pytest_circuitfreeze.engines import Engine
from pytest_circuitfreeze.suites.contenders import IN_PLACE, hooked_by_hand
from pytest_circuitfreeze.suites.paired import Call, Pairs
from pytest_circuitfreeze.suites.sizes import gpt2, ids
from pytest_circuitfreeze.threads import one_thread

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

ROUNDS = 20
HANDS = 5
"""Hooks by hand that an installation with all its checks may cost."""
EXTRA = 0.01
"""Of the parameters' bytes, what a freeze may hold."""
WIDTHS = {"12 layers, hidden 48": {"n_embd": 48}, "12 layers, hidden 768": {}}
widths = pytest.mark.parametrize("width", WIDTHS)


@pytest.mark.benchmark(group="install and remove", timer=process_time)
@widths
def bench_install_and_remove(benchmark: BenchmarkFixture, circuit_engine: Engine, width: str) -> None:
    """One config over 12 layers, on and off, as a ratio to 12 hooks by hand; it must not grow with the parameters."""
    model = gpt2(**WIDTHS[width])
    config = InterventionConfig(head_indices=[1, 2], circuit="qk")
    by_hand = partial(on_and_off, partial(hooked_by_hand, model, config, in_place=True))
    installed = partial(on_and_off, partial(circuit_engine.freeze, model, config))
    with one_thread():
        pairs = Pairs(by_hand, {circuit_engine.name: lambda: nullcontext(installed)}, floor=IN_PLACE)
        pairs.rounds(ROUNDS)
        benchmark.pedantic(installed, rounds=ROUNDS)
    benchmark.extra_info.update(row=width, engine=circuit_engine.name, ratios=pairs.spreads(), target=HANDS, missing={})


def on_and_off(freeze: Callable[[], AbstractContextManager[Any]]) -> None:
    """Enters and leaves."""
    with freeze():
        pass


@pytest.mark.benchmark(group="memory held", timer=process_time)
@pytest.mark.parametrize("freeze_type", ["zero", "noise"])
@widths
def bench_memory(benchmark: BenchmarkFixture, circuit_engine: Engine, width: str, freeze_type: str) -> None:
    """Bytes of tensors that live because of a freeze, after a pass and without its outputs, over the parameters'."""
    model: PreTrainedModel = gpt2(**WIDTHS[width])
    config = InterventionConfig(head_indices=[1, 2], circuit="both", freeze_type=freeze_type, noise_std=1.0)
    prompt = ids(model, 64)
    with torch.no_grad():
        model(input_ids=prompt)
        before = bytes_alive()
        with circuit_engine.freeze(model, config) as call:
            step: Call = partial(call, input_ids=prompt)
            benchmark.pedantic(step, rounds=2)
            extra = bytes_alive() - before
    share = extra / sum(parameter.nbytes for parameter in model.parameters())
    ratios = {circuit_engine.name: {"median": share, "low": share, "high": share, "n": 1}}
    benchmark.extra_info.update(
        row=f"{width}, {freeze_type}", engine=circuit_engine.name, ratios=ratios, target=EXTRA, missing={}
    )


def bytes_alive() -> int:
    """Bytes of all storages that some tensor of this process has, each counted once."""
    gc.collect()
    plain = (torch.Tensor, torch.nn.Parameter)  # a compiler's fakes hold no memory
    storages = [found.untyped_storage() for found in gc.get_objects() if type(found) in plain]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
