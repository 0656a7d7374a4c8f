"""Clean and corrupted prompts, read and paired before any forward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from freeze_core.errors import InterventionError
from freeze_core.runs.dataset import batches_in, refuse_single
from freeze_core.scoring.batches import Batch

__all__ = ["Pair", "pairs_of", "prompts"]


class Pair(NamedTuple):
    """A batch of clean prompts, and the corrupted ones of the same rows and columns."""

    clean: Batch
    corrupted: Batch


def prompts(
    model: nn.Module, inputs: object, tokenizer: Any, batch_size: int, positions: object, name: str
) -> list[Batch]:
    """The batches of prompts, two at least, since intervals are over prompts.

    Args:
        inputs: token ids `[prompt, token]`, a dict of model arguments, an iterable of either, or of texts.
        tokenizer, batch_size: for texts.
        positions: of the logits that a metric is handed.
        name: what the user calls the inputs.

    Raises:
        InterventionError: fewer than two prompts, or some that cannot be read.
    """
    batches = batches_in(model, inputs, tokenizer, batch_size, positions, name=name, least=1)
    refuse_single(name, sum(batch.rows for batch in batches), "prompt")
    return batches


def pairs_of(
    model: nn.Module, clean: object, corrupted: object, tokenizer: Any, batch_size: int, positions: object, name: str
) -> list[Pair]:
    """The pairs of batches of `clean` prompts, called `name`, and `corrupted` ones.

    Raises:
        InterventionError: as `prompts`, or those that are no pairs: of other shapes, or padded otherwise.
    """
    several = prompts(model, clean, tokenizer, batch_size, positions, name)
    others = prompts(model, corrupted, tokenizer, batch_size, positions, "corrupted")
    if len(several) != len(others):
        raise InterventionError(f"{name} has {len(several)} batches and corrupted {len(others)}: give one for each")
    pairs = [Pair(*both) for both in zip(several, others, strict=True)]
    for number, pair in enumerate(pairs):
        _refuse_unpaired(number, pair, name)
    return pairs


def _refuse_unpaired(number: int, pair: Pair, name: str) -> None:
    """Raises `InterventionError` where an activation of one prompt has no place in the run of the other."""
    tensors = [
        {key: value for key, value in batch.arguments.items() if isinstance(value, Tensor)}
        for batch in (pair.clean, pair.corrupted)
    ]
    for key in sorted({*tensors[0], *tensors[1]}):
        one, other = (arguments.get(key) for arguments in tensors)
        if key.endswith("mask"):
            if not _padded_alike(one, other):
                raise InterventionError(
                    f"{key} of batch {number} of {name} is another than that of corrupted: pair prompts that have as "
                    "many tokens, row by row, padded alike"
                )
        elif one is None or other is None or one.shape != other.shape:
            shapes = [None if value is None else list(value.shape) for value in (one, other)]
            raise InterventionError(
                f"{key} of batch {number} of {name} is {shapes[0]} and of corrupted {shapes[1]}: pair prompts that "
                "have as many tokens, row by row"
            )


def _padded_alike(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two masks are the same; none at all is one without padding."""
    if one is None or other is None:
        given = other if one is None else one
        return given is None or bool((given != 0).all())
    return one.shape == other.shape and torch.equal(one, other)
