"""Which token each position is to predict: its own label, or that of the next position.

Decoders compare the logits of a position with the label of the next one, masked language models and decoders of an
encoder's states with its own. No name tells which: the model's own loss on the same labels does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from freeze_core.errors import InterventionError
from freeze_core.generators import Generators
from freeze_core.inputs import logits_of, run
from freeze_core.scoring.batches import IGNORED, Batch, copied

__all__ = ["labels_of", "with_labels"]

_SHIFTS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Whether each model that was asked shifts labels."""

NEARER = 8
"""How many times nearer the model's loss must be to one of the two than to the other."""


def labels_of(model: nn.Module, batches: Sequence[Batch]) -> list[Tensor | None]:
    """For each batch the token that each position is to predict, as `Batch.labels` but as the model's own loss has it.

    Where it is not known yet, the model runs once on one row of the first batch with labels.

    Raises:
        InterventionError: labels were given, and the model has no loss that shows what they are compared with; or none
            were given, and the model does not predict the next token.
    """
    labelled = next((batch for batch in batches if batch.tokens is not None), None)
    if labelled is None:
        return [batch.labels for batch in batches]
    shifts = _SHIFTS.get(model)
    if shifts is None:
        shifts = _compares_with_next(model, labelled)
    if shifts is None:
        if any(batch.labels_given and not batch.decodes for batch in batches):
            raise InterventionError(
                f"inputs hold labels, and the loss of {type(model).__name__} on them is neither that of each token's "
                "own label nor that of the next token's: it is unknown which of the two is meant; give targets=, or a "
                "metric of your own"
            )
        return [batch.labels for batch in batches]
    _SHIFTS[model] = shifts
    if not shifts and any(batch.tokens is not None and not batch.labels_given for batch in batches):
        raise InterventionError(
            f"inputs hold no labels, and the loss of {type(model).__name__} compares the logits of each token with "
            "its own label: give labels among the arguments, -100 at tokens that were not masked; or targets= or a "
            "metric of your own"
        )
    return [batch.next_labels if shifts else batch.own_labels for batch in batches]


def _compares_with_next(model: nn.Module, batch: Batch) -> bool | None:
    """Whether the model's own loss compares logits with the label of the next position, not their own; `None` unknown.

    The loss of a pass is compared with that computed here in either way. One has to agree, and the other to be far off.
    """
    assert batch.tokens is not None
    rows = slice(None)
    if batch.by_token:  # one row is enough, that with the most labels
        row = int((batch.tokens != IGNORED).sum(1).argmax())
        rows = slice(row, row + 1)
    tokens = batch.tokens[rows]
    arguments = {
        name: value[rows] if batch.by_token and isinstance(value, Tensor) else value
        for name, value in batch.arguments.items()
    }
    device = next((value.device for value in arguments.values() if isinstance(value, Tensor)), tokens.device)
    generators = Generators(model)
    before = generators.states()
    try:
        with torch.no_grad():
            output = run(model, copied({**arguments, "labels": tokens.to(device)}))
        logits, loss = logits_of(output).detach(), getattr(output, "loss", None)
    except InterventionError:
        return None
    finally:
        generators.put(before)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or logits.dim() != 3 or logits.shape[:2] != tokens.shape:
        return None
    tokens = tokens.to(logits.device)
    to_next = abs(float(loss) - _cross_entropy(logits[:, :-1], tokens[:, 1:]))
    to_own = abs(float(loss) - _cross_entropy(logits, tokens))
    near, far = sorted((to_next, to_own))
    bound = max(1e-4, 4 * torch.finfo(logits.dtype).eps) * max(1.0, abs(float(loss)))
    # Where nothing has a label the difference is nan, and every comparison with it is false.
    return to_next < to_own if near <= bound and far >= NEARER * near else None


def _cross_entropy(logits: Tensor, labels: Tensor) -> float:
    exact = logits if logits.dtype == torch.float64 else logits.float()
    return float(F.cross_entropy(exact.flatten(0, 1), labels.flatten(), ignore_index=IGNORED))


def with_labels(model: nn.Module, batches: Sequence[Batch]) -> list[Batch]:
    """The batches with the labels that the model's own loss has."""
    return [replace(batch, labels=labels) for batch, labels in zip(batches, labels_of(model, batches), strict=True)]
