"""A data set of token ids or of texts as batches, checked before any forward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from freeze_core.arguments import refuse
from freeze_core.errors import InterventionError, shown
from freeze_core.scoring.batches import IGNORED, Batch, batches_of
from freeze_core.scoring.labels import with_labels

__all__ = ["batches_in", "listed_prompts", "refuse_single", "tokens_of", "with_next_tokens"]


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
    texts, prompts = listed_prompts(dataset, tokenizer, name)
    return batches_of(model, tokens_of(prompts, tokenizer, batch_size, name, least) if texts else prompts, positions)


def listed_prompts(given: Any, tokenizer: object, name: str) -> tuple[bool, Any]:
    """Whether prompts are texts, and the prompts: a tensor and a dict as they are, others as a list.

    Raises:
        InterventionError: something else, no prompt, or a tokenizer that has no text.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        refuse(name, given, "token ids, dicts of model arguments, or a list of texts")
    prompts: Any = given if isinstance(given, Tensor | Mapping) else list(given)
    if not len(prompts):
        raise InterventionError(f"{name} is empty: give some prompts")
    texts = isinstance(prompts, list) and any(isinstance(prompt, str) for prompt in prompts)
    if not texts and tokenizer is not None:
        raise InterventionError("tokenizer: must be None for prompts of token ids; texts are what it is for")
    return texts, prompts


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
