"""What the benchmarks measure by: pairs of calls, and hooks by hand that freeze what they are compared with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch

from freeze_core import InterventionConfig
from pytest_circuitfreeze.engines import FreezeCore
from pytest_circuitfreeze.models import tiny_model
from pytest_circuitfreeze.suites.contenders import contenders, demand_alike, stretches, twin
from pytest_circuitfreeze.suites.paired import Pairs, spread

IDS = torch.arange(12).view(1, 12)


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "falcon_mqa"])
@pytest.mark.parametrize("circuit", ["qk", "ov"])
def test_hooks_by_hand_freeze_what_the_engine_does(name: str, circuit: str) -> None:
    model = tiny_model(name)
    freezes, _ = contenders(FreezeCore(), model, InterventionConfig(head_indices=[1, 2], circuit=circuit))
    with torch.no_grad():
        demand_alike({each: freezes[each] for each in list(freezes)[:3]}, model, IDS)


def test_a_contender_that_freezes_nothing_is_told() -> None:
    model = tiny_model("gpt2")
    freezes, _ = contenders(FreezeCore(), model, InterventionConfig(head_indices=[1, 2], circuit="qk"))
    with torch.no_grad(), pytest.raises(AssertionError, match=r"^idle: logits off by"):
        demand_alike({**freezes, "idle": lambda: nullcontext(model)}, model, IDS)


def test_a_call_that_does_twice_the_work_costs_twice() -> None:
    values = torch.rand(200, 200)

    def work(times: int) -> None:
        for _ in range(times):
            values @ values

    pairs = Pairs(partial(work, 2), {"twice": lambda: nullcontext(partial(work, 4))})
    for _ in range(9):
        pairs.round()
    found = pairs.spreads()
    assert 0.7 < found["plain"]["median"] < 1.4
    assert 1.4 < found["twice"]["median"] < 2.8
    assert found["twice"]["n"] == 9


def test_plain_calls_are_made_outside_of_the_freeze() -> None:
    on, seen = [], []

    @contextmanager
    def frozen():
        on.append(True)
        yield lambda: None
        on.pop()

    pairs = Pairs(lambda: seen.append(bool(on)), {"frozen": frozen})
    pairs.round()
    assert seen
    assert not any(seen)


def test_a_spread_and_stretches_by_hand() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.5, "high": 2.5, "n": 3}
    assert stretches([4, 0, 1, 2, 7, 8]) == [(0, 3), (4, 5), (7, 9)]


def test_a_twin_shares_all_weights_and_no_module() -> None:
    model = tiny_model("gpt2")
    other = twin(model)
    assert all(one is two for one, two in zip(model.parameters(), other.parameters(), strict=True))
    assert not {*model.modules()} & {*other.modules()}


def test_a_freeze_that_costs_more_than_its_limit_fails_in_one_line(tmp_path: Path) -> None:
    test = "circuitfreeze/bench_overhead.py::bench_frozen_forward[gpt2-one_head_ov_zero]"
    command = [sys.executable, "-P", "-m", "pytest", "-q", "--circuitfreeze", "--circuitfreeze-bench", test]
    # In a worker of xdist pytest-benchmark would measure nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    for limit, status in ((0.5, 1), (50.0, 0)):
        ran = subprocess.run(
            [*command, f"--circuitfreeze-bench-limit={limit}", "--circuitfreeze-report=out"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == status, ran.stdout
        told = [line for line in ran.stdout.splitlines() if line.startswith("a forward under one_head_ov_zero costs")]
        assert len(told) == status
        assert all(line.endswith(f"the limit is {limit:g}") for line in told)
        assert "Traceback" not in ran.stdout
        (result,) = json.loads((tmp_path / "out" / "report.json").read_text())["results"]
        assert result["benchmark"]["target"] == limit
