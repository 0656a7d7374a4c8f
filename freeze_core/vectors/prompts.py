"""The prompts that a vector is found in and judged on, of which some rows can be run without the others."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from freeze_core.errors import InterventionError, shown
from freeze_core.runs.dataset import listed_prompts, tokens_of
from freeze_core.scoring.batches import Batch, batches_of
from freeze_core.statistics import digest_of

__all__ = ["Prompts", "digests"]


class Prompts:
    """Prompts of one kind.

    Args:
        model: that they are for.
        given: token ids `[prompt, token]`, a dict of model arguments (with an `attention_mask` where there is padding),
            an iterable of either, or a list of texts.
        what: whose they are, for errors.
        tokenizer: for texts.
        batch_size: how many texts are padded to one length, and run at once.

    Raises:
        InterventionError: none, or what cannot be run.
    """

    def __init__(self, model: nn.Module, given: object, what: str, tokenizer: Any, batch_size: int) -> None:
        self._model, self._what = model, what
        self._tokenizer, self._batch_size = tokenizer, batch_size
        self._texts: list[str] = []
        self._batches: list[Batch] = []
        texts, prompts = listed_prompts(given, tokenizer, what)
        if texts:
            tokens_of(prompts, tokenizer, batch_size, what, 1)  # raises for texts that have no tokens
            self._texts = prompts
        else:
            self._batches = batches_of(model, prompts, "all")

    def __len__(self) -> int:
        return len(self._texts) or sum(batch.rows for batch in self._batches)

    def batches(self, rows: Sequence[int], positions: object) -> list[Batch]:
        """Batches of these prompts alone, in ascending order.

        Args:
            rows: of all prompts.
            positions: as in `score_heads`.

        Raises:
            InterventionError: no such positions, or one that is padding.
        """
        made = batches_of(self._model, self._chosen(sorted(rows)), positions)
        for batch in made:
            if positions != "all" and not bool(batch.real.all()):
                raise InterventionError(
                    f"positions={shown(positions)}: one of them is padding in some prompt of {self._what}: name "
                    "columns that are real in all prompts, or 'last'"
                )
        return made

    def _chosen(self, rows: Sequence[int]) -> list[Any]:
        if self._texts:
            return list(tokens_of([self._texts[row] for row in rows], self._tokenizer, self._batch_size, self._what, 1))
        ends = list(accumulate(batch.rows for batch in self._batches))
        several = []
        for batch, end in zip(self._batches, ends, strict=True):
            own = torch.tensor([row - end + batch.rows for row in rows if end - batch.rows <= row < end])
            if len(own):
                several.append(_rows_of(batch, own))
        return several


def _rows_of(batch: Batch, rows: Tensor) -> Tensor | dict[str, Any]:
    """Some rows of a batch as it was given: of all tensors that have its rows first."""
    if isinstance(batch.given, Tensor):
        return batch.given[rows.to(batch.given.device)]
    return {
        name: value[rows.to(value.device)]
        if isinstance(value, Tensor) and value.dim() and len(value) == batch.rows
        else value
        for name, value in batch.given.items()
    }


def digests(batches: Sequence[Batch]) -> list[str]:
    """A hash of each prompt: of its real tokens where it is token ids, else of all that its row holds."""
    made = []
    for batch in batches:
        given = {name: value for name, value in batch.arguments.items() if isinstance(value, Tensor) and value.dim()}
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        alone = ids is not None and given.keys() <= {"input_ids", "attention_mask", "position_ids"}
        for row in range(batch.rows):
            if alone and ids is not None:
                real = ids[row] if mask is None else ids[row][mask[row].to(ids.device).bool()]
                made.append(digest_of([real.long()]))
            else:
                made.append(digest_of([value[row] for value in given.values() if len(value) == batch.rows]))
    return made
