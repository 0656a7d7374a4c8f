"""A frozen call beside plain ones, by the engine, by hand, and by each installed peer.

On the CPU, on one thread, without gradients, heads 1 and 2 of every layer at zero. Ratios of CPU time to plain calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from freeze_core import InterventionConfig
from pytest_circuitfreeze.engines import Engine
from pytest_circuitfreeze.suites.contenders import BY_HAND, Freeze, contenders, demand_alike
from pytest_circuitfreeze.suites.paired import Call, Pairs
from pytest_circuitfreeze.suites.sizes import SIZES, ids
from pytest_circuitfreeze.threads import one_thread

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

HEADS = [1, 2]
AT_MOST = 1.01
"""What a freeze may cost where the model's own products are the cost."""

built = cache(lambda size: SIZES[size][0]())
sizes = pytest.mark.parametrize("size", SIZES)
circuits = pytest.mark.parametrize("circuit", ["qk", "ov"])


def side_by_side(
    benchmark: BenchmarkFixture,
    engine: Engine,
    size: str,
    circuit: str,
    workload: Callable[[Callable[..., Any], Tensor], Call],
) -> None:
    """Measures `workload` for each contender, and puts ratios, target and what is missing on record."""
    model: PreTrainedModel = built(size)
    _, tokens, rounds = SIZES[size]
    prompt = ids(model, tokens)
    freezes, missing = contenders(engine, model, InterventionConfig(head_indices=HEADS, circuit=circuit))

    @contextmanager
    def frozen(freeze: Freeze) -> Iterator[Call]:
        with freeze() as call:
            yield workload(call, prompt)

    with one_thread(), torch.no_grad():
        for name in [name for name in freezes if name not in (engine.name, *BY_HAND)]:
            try:
                with frozen(freezes[name]) as call:
                    call()
            except Exception as error:  # whatever a peer's library fails with is told in its place
                missing[name] = f"{type(error).__name__}: {error}"
                del freezes[name]
        demand_alike(freezes, model, prompt)
        pairs = Pairs(workload(model, prompt), {name: partial(frozen, freeze) for name, freeze in freezes.items()})
        pairs.rounds(rounds)
        with frozen(freezes[engine.name]) as own:
            benchmark.pedantic(own, rounds=rounds)
    ratios = pairs.spreads()
    best = min(ratios[name]["median"] for name in BY_HAND)
    benchmark.extra_info.update(
        row=f"{size}, {circuit}, {tokens} tokens",
        engine=engine.name,
        ratios=ratios,
        target=best if size == "tiny" else AT_MOST,
        missing=missing,
    )
