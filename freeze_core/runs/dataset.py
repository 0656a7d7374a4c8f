"""A data set of token ids or of texts as batches, checked before any forward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from freeze_core.errors import InterventionError, shown
from freeze_core.scoring.batches import IGNORED, Batch, batches_of
from freeze_core.scoring.labels import with_labels

__all__ = ["batches_in", "refuse_single", "tokens_of", "with_next_tokens"]


def with_next_tokens(model: nn.Module, batches: Sequence[Batch]) -> list[Batch]:
    """The batches with the labels that the model's own loss has; each row is a sequence with a token to predict.

    Raises:
        InterventionError: a batch without labels, or a row with nothing to predict.
    """
    batches = with_labels(model, batches)
    for number, batch in enumerate(batches):
        if batch.labels is None:
            raise InterventionError(f"batch {number} of dataset has no next tokens: give input_ids, or labels with it")
        nothing = (batch.labels == IGNORED).all(1)
        if bool(nothing.any()):
            raise InterventionError(
                f"row {int(nothing.nonzero()[0])} of batch {number} of dataset has no next token to predict: give "
                "sequences of two real tokens at least"
            )
    return batches


def refuse_single(name: str, rows: int, what: str) -> None:
    """Raises `InterventionError` for a single row, over which there are no intervals."""
    if rows < 2:
        raise InterventionError(f"{name} has one {what}: must have two at least, for intervals over {what}s")


def batches_in(
    model: nn.Module,
    dataset: object,
    tokenizer: Any,
    batch_size: int,
    positions: object = "all",
    *,
    name: str,
    least: int,
) -> list[Batch]:
    """The batches of a data set of token ids or of texts.

    Args:
        dataset, tokenizer: as for `sequences`.
        positions: as for `batches_of`.
        name: what the user calls the data set.
        least: how many tokens a text must make.

    Raises:
        InterventionError: no batch, or texts that cannot be made tokens.
    """
    if isinstance(dataset, str):
        raise InterventionError(f"{name}={shown(dataset)}: must be a list of texts, not one")
    listed = dataset if isinstance(dataset, Tensor | Mapping) or not isinstance(dataset, Iterable) else list(dataset)
    if isinstance(listed, list) and any(isinstance(one, str) for one in listed):
        listed = tokens_of(listed, tokenizer, batch_size, name, least)
    elif tokenizer is not None:
        raise InterventionError("tokenizer: must be None for a data set of token ids; texts are what it is for")
    elif isinstance(listed, list) and not listed:
        raise InterventionError(f"{name} is empty: give at least two sequences")
    return batches_of(model, listed, positions)


def tokens_of(
    texts: Sequence[object], tokenizer: Any, batch_size: int, name: str, least: int
) -> list[dict[str, Tensor]]:
    """Batches of token ids and masks of `texts`, padded to the longest of `batch_size`.

    Args:
        tokenizer: of transformers.
        name: whose texts, for errors.
        least: tokens that each must make, two where one is to predict the next.

    Raises:
        InterventionError: no tokenizer, or no text that it can make such tokens of.
    """
    if not callable(tokenizer):
        raise InterventionError(f"tokenizer={shown(tokenizer)}: must be the model's tokenizer, for {name} of texts")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise InterventionError(f"text {number} of {name} is {shown(text)}: must be a string, as others are")
    if getattr(tokenizer, "pad_token", None) is None and len(texts) > 1:
        raise InterventionError(
            "tokenizer has no pad_token, and texts of several lengths are padded: set one, which the attention_mask "
            "hides (tokenizer.pad_token = tokenizer.eos_token)"
        )
    batches = []
    for start in range(0, len(texts), batch_size):
        made = tokenizer(list(texts[start : start + batch_size]), padding=len(texts) > 1, return_tensors="pt")
        tokens = {each: made[each] for each in ("input_ids", "attention_mask") if each in made}
        lengths = torch.as_tensor(tokens["attention_mask"]).sum(1)
        for row in (lengths < least).nonzero().flatten().tolist():
            raise InterventionError(
                f"text {start + row} of {name}, {shown(texts[start + row])}, makes {int(lengths[row])} tokens: must "
                f"make {'two at least, one to predict' if least > 1 else 'one at least'}"
            )
        batches.append(tokens)
    return batches
