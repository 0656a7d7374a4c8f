"""Clean and corrupted prompts, and a model patched on them."""

from __future__ import annotations

from typing import Any

import torch

from freeze_core import PatchingStudy, patch_activations

TARGETS = (5, 7)
GENERATOR = torch.Generator().manual_seed(0)
CLEAN, CORRUPTED = torch.randint(0, 60, (2, 3, 6), generator=GENERATOR)
LEFT = (torch.arange(6) >= torch.tensor([[0], [2], [3]])).long()
FIELDS = {"metric": "logit_difference", "targets": TARGETS, "progress": False, "resamples": 199}


def patched(model: Any, clean: Any = CLEAN, corrupted: Any = CORRUPTED, **options: Any) -> PatchingStudy:
    return patch_activations(model, clean, corrupted, **FIELDS | options)
