"""Several processes at once, each with a model of its own that it freezes: what they give is what one process gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.multiprocessing
from plain_freeze import agrees, config_of, frozen_logits, logits, plain

from pytest_circuitfreeze.models import tiny_model


def work(name: str, freeze_type: str, results: Any) -> None:
    """What one process does."""
    model = tiny_model(name)
    frozen = frozen_logits(model, config_of(freeze_type, model))
    results.put((name, freeze_type, frozen.numpy(), logits(model).numpy()))


def test_each_process_freezes_its_own() -> None:
    context: Any = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    asked = [("llama_gqa", "noise"), ("gpt2", "mean")]
    processes = [context.Process(target=work, args=(*each, results)) for each in asked]
    for process in processes:
        process.start()
    told = sorted((results.get() for _ in processes), key=lambda one: str(one[0]), reverse=True)
    for process in processes:
        process.join()
    for (name, freeze_type, frozen, unfrozen), wanted in zip(told, asked, strict=True):
        assert (name, freeze_type) == wanted
        agrees(*(torch.from_numpy(np.array(one)) for one in (frozen, unfrozen)), plain(name, freeze_type)[1])
