"""What is measured of each sequence: sums over its targets, from which every mean is made."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from freeze_core.scoring.batches import IGNORED, Batch
from freeze_core.scoring.metrics import log_probabilities

__all__ = ["Sums", "sums"]


class Sums(NamedTuple):
    """Sums over each sequence's targets, the real tokens that follow a real token, `[sequence]` in float64.

    Args:
        loss: cross-entropy of the next token, in nats.
        correct: how often the next token was the likeliest.
        kl: divergence of the distribution from that of the clean run, `KL(clean || frozen)`, in nats.
    """

    loss: Tensor
    correct: Tensor
    kl: Tensor


def sums(batch: Batch, logits: Tensor, clean: Tensor) -> Sums:
    """The sums of each row, for `logits` and those of the `clean` run `[row, token, word]`."""
    assert batch.labels is not None
    labels = batch.labels.to(logits.device)
    rows, at = (labels != IGNORED).nonzero(as_tuple=True)
    words = labels[rows, at]
    found, expected = log_probabilities(logits[rows, at]), log_probabilities(clean[rows, at])
    best = logits[rows, at].argmax(-1)  # of the logits: their logarithms may be equal where they are not
    losses = -found.gather(-1, words[:, None])[:, 0]
    divergences = torch.where(expected == -torch.inf, 0, expected.exp() * (expected - found)).sum(-1)

    def of_rows(values: Tensor) -> Tensor:
        total = torch.zeros(batch.rows, dtype=torch.float64)
        return total.index_add(0, rows.cpu(), values.detach().cpu().double())

    return Sums(of_rows(losses), of_rows(best == words), of_rows(divergences))
