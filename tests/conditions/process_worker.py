"""What one of several processes does: in a module of its own, since a spawned process cannot import a test file."""

from __future__ import annotations

import numpy as np
import torch
from plain_freeze import config_of, frozen_logits, logits

from pytest_circuitfreeze.models import tiny_model


def work(name: str, freeze_type: str) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a tiny model of its own, frozen and unfrozen."""
    torch.set_num_threads(1)
    model = tiny_model(name)
    frozen = frozen_logits(model, config_of(freeze_type, model))
    return frozen.numpy(), logits(model).numpy()
