"""A sweep that processes share: each does its part of the passes, and all have the bits that one process gives."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sweep_worker import BATCHES, CASES, MODELS, Stops, scored, table
from torch import nn

from freeze_core import InterventionError, UnsupportedModelError
from freeze_core.scoring.distributed import refuse_sharded
from pytest_circuitfreeze.models import tiny_model

WORKER = Path(__file__).with_name("sweep_worker.py")
Told = list[dict[str, Any]]


def start(folder: Path, processes: int) -> Told:
    """What each of so many processes tells."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    run = subprocess.run([*command, str(WORKER), str(folder)], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Told:
    return start(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Told:
    return start(tmp_path_factory.mktemp("three"), 3)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """As the processes have: products over several threads may be other bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("processes", ["two", "three"])
@pytest.mark.parametrize(("name", "case"), list(product(MODELS, CASES)))
def test_all_processes_give_the_bits_of_one(
    processes: str, name: str, case: str, request: pytest.FixtureRequest
) -> None:
    told = request.getfixturevalue(processes)
    model = tiny_model(name)
    expected = table(scored(model, **CASES[case]))
    for each in told:
        assert each["shared"][f"{name} {case}"]["table"] == expected


OWN = (4, 4, 5)
"""Runs of each layer for a batch that every process does: the clean pass, and those that look what can be left out."""

STACKED = {
    ("gpt2", "last"): (24, 27, 30),
    ("gpt2", "all"): (24, 27, 30),
    ("gpt2", "odd"): (4, 4, 8),
    ("llama_gqa", "last"): (24, 27, 30),
    ("llama_gqa", "all"): (18, 21, 24),  # query heads that share a KV head once
    ("llama_gqa", "odd"): (4, 4, 8),
}
"""Runs of each layer for freezes, all batches together: a layer's in it, and where they are stacked one in later ones.

Four freezes a layer, as in the last case, are not stacked.
"""


def runs_of(told: Told, name: str, case: str) -> list[list[int]]:
    """Runs of each layer for freezes, by process."""
    batches = 1 if "inputs" in CASES[case] else len(BATCHES)
    looking = (0, 0, 0) if case == "odd" else (0, 1, 1)  # whether freezes can be stacked
    asked = int(CASES[case]["metric"] == "loss")  # one pass, that says whether the model's own loss shifts labels
    own = [batches * (one + more) + asked for one, more in zip(OWN, looking, strict=True)]
    counts = [each["shared"][f"{name} {case}"]["counts"] for each in told]
    return [[count - one for count, one in zip(of_process, own, strict=True)] for of_process in counts]


@pytest.mark.parametrize("processes", ["two", "three"])
@pytest.mark.parametrize(("name", "case"), list(product(MODELS, CASES)))
def test_all_processes_together_do_each_pass_once(
    processes: str, name: str, case: str, request: pytest.FixtureRequest
) -> None:
    runs = runs_of(request.getfixturevalue(processes), name, case)
    assert tuple(map(sum, zip(*runs, strict=True))) == STACKED[name, case]


@pytest.mark.parametrize(("name", "case"), list(product(MODELS, CASES)))
def test_each_of_two_processes_does_half_of_the_passes(two: Told, name: str, case: str) -> None:
    """A layer's eight freezes are one stack: two layers go to the two, and the third one to each in turn."""
    one, other = (sum(counts) for counts in runs_of(two, name, case))
    stack = 10  # with its runs of later layers
    assert abs(one - other) <= (0 if case == "odd" else stack)


@pytest.mark.parametrize(("name", "case"), list(product(MODELS, CASES)))
def test_shares_of_three_processes_are_as_even_as_they_can_be(three: Told, name: str, case: str) -> None:
    """Each has one of three layers, which differ by the runs of later ones; or, unstacked, of each of two its part."""
    runs = [sum(counts) for counts in runs_of(three, name, case)]
    assert max(runs) - min(runs) <= (2 * 2 if case == "odd" else 2 * len(BATCHES))


REFUSALS = {
    "inputs": ["process 0 and process 1: inputs (", "process 0 and process 1: inputs ("],
    "model": ["process 0 and process 1: model's parameters (", "process 0 and process 1: model's parameters ("],
    "hooks": ["the norm of the clean logits over batch 0 is"] * 2,
    "draws": ["distributed: the passes over batch 0 draw (dropout) from other states of torch's generators"] * 2,
    "metric": ["process 0 and process 1: metric (kl, and loss)", "process 0 and process 1: metric (kl, and loss)"],
    "argument": ["given up, process 1: InterventionError: strength=2.0", "InterventionError: strength=2.0"],
    "method": ["given up, process 1: InterventionError: method='guess'", "InterventionError: method='guess'"],
    "error": ["given up, process 1: ZeroDivisionError: stopped", "ZeroDivisionError: stopped"],
    "memory": ["OutOfMemoryError: stopped", "given up, process 0: OutOfMemoryError: stopped"],
    "wrapped": ["the model is a DistributedDataParallel, which run each pass together"] * 2,
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_goes_wrong_in_one_process_is_raised_in_both(two: Told, case: str) -> None:
    for each, message in zip(two, REFUSALS[case], strict=True):
        assert message in each["refused"][case]


def test_a_process_that_is_gone_is_waited_for_by_none(two: Told) -> None:
    assert two[0]["left alone"].startswith("InterventionError: distributed: process 0 cannot reach the others (")


@pytest.mark.parametrize("at", ["first", "second"])
def test_a_shared_sweep_that_was_stopped_goes_on(two: Told, at: str) -> None:
    expected = table(scored(tiny_model("gpt2"), metric=Stops(0), positions="last"))
    messages = ["KeyboardInterrupt: stopped", "given up, process 0: KeyboardInterrupt: stopped"]
    if at == "second":
        messages = ["given up, process 1: KeyboardInterrupt: stopped", "KeyboardInterrupt: stopped"]
    for each, message in zip(two, messages, strict=True):
        told = each["stopped"][at]
        assert message in told["raised"]
        assert told["table"] == expected
    calls = sum(each["stopped"][at]["calls"] for each in two)
    # The 15th call is in the last layer of the first batch, whose others were done; or in the second batch, where the
    # other process has done a layer.
    kept = {"first": 2 * 8 + 5, "second": 3 * 8 + 4 + 8}[at]
    assert calls == 2 * 3 + 72 - kept


def test_a_group_of_one_process_sweeps_alone(two: Told) -> None:
    expected = table(scored(tiny_model("gpt2"), **CASES["last"]))
    assert all(each["alone"]["table"] == expected for each in two)


@pytest.mark.parametrize(("ranks", "fine"), [([0, 1], False), ([1, 2, 3], False), ([0, 2], True), ([1], True)])
def test_copies_that_are_spread_over_processes_share_passes_among_one_of_each(ranks: list[int], fine: bool) -> None:
    mesh = SimpleNamespace(size=lambda: 2, mesh=torch.tensor([[1, 2]]) if ranks == [1, 2, 3] else torch.tensor([0, 1]))
    model = nn.Linear(1, 1)
    model.weight.device_mesh = mesh
    processes: Any = SimpleNamespace(size=len(ranks), ranks=ranks)
    with nullcontext() if fine else pytest.raises(UnsupportedModelError, match="cannot share the passes out"):
        refuse_sharded(model, processes, checkpoint=False)


@pytest.mark.parametrize("distributed", [True, 2, "gloo", None])
def test_no_processes_are_refused(distributed: object) -> None:
    with pytest.raises(InterventionError, match="distributed="):
        scored(tiny_model("gpt2"), metric="kl", distributed=distributed)
