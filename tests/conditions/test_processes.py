"""Several processes at once, each with a model of its own that it freezes: what they give is what one process gives."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch
from plain_freeze import agrees, plain
from process_worker import work


def test_each_process_freezes_its_own() -> None:
    asked = [("llama_gqa", "noise"), ("gpt2", "mean")]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        told = list(pool.map(work, *zip(*asked, strict=True), timeout=300))
    for each, (frozen, unfrozen) in zip(asked, told, strict=True):
        agrees(torch.from_numpy(frozen), torch.from_numpy(unfrozen), plain(*each)[1])
