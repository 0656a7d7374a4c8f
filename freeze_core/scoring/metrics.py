"""Metrics: what of the logits is scored, one number a row."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from freeze_core.errors import InterventionError, shown
from freeze_core.inputs import vocabulary_size
from freeze_core.scoring.batches import IGNORED, Batch, copied
from freeze_core.scoring.labels import labels_of

__all__ = ["Metric", "log_probabilities", "metric_of"]


class Situation(NamedTuple):
    """What a metric may know besides the logits: the batch, its targets or labels, and the logits of the clean pass."""

    batch: Batch
    targets: Tensor | None
    labels: Tensor | None
    clean: Tensor


class Metric:
    """A metric, checked against the batches it is to be taken of, and the name it goes by.

    Args:
        targets: of each batch `[row, target]`.
        labels: of each batch `[row, position]`, as the model's own loss has them; for `loss` without targets.
        qualified_name: with the module that it is from, where it is the user's own.
    """

    def __init__(
        self,
        name: str,
        compute: Callable[[Tensor, Situation], Any],
        targets: Sequence[Tensor | None],
        qualified_name: str = "",
        labels: Sequence[Tensor | None] = (),
    ):
        self.name = name
        self.targets = targets
        self.qualified_name = qualified_name or name
        self._compute = compute
        self._labels = labels or [None] * len(targets)

    def rows(self, number: int, batch: Batch, logits: Tensor, clean: Tensor, what: str) -> Tensor:
        """The metric of batch `number`, `[row]` in float64 on the CPU, for `logits` `[row, position, word]`.

        Raises:
            InterventionError: it gives something other than one number a row.
        """
        return self.values(number, batch, logits, clean, what).detach()

    def values(self, number: int, batch: Batch, logits: Tensor, clean: Tensor, what: str) -> Tensor:
        """The same with its gradient, as far as the metric has one."""
        if logits.untyped_storage().data_ptr() == clean.untyped_storage().data_ptr():
            logits = logits.clone()  # a metric that writes to its logits must not write to those of the clean pass
        given = self._compute(logits, Situation(batch, self.targets[number], self._labels[number], clean))
        try:
            value = torch.as_tensor(given)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InterventionError(
                f"metric={self.name} gave {shown(given)}: must be one number a row, [{batch.rows}]"
            ) from error
        if value.shape != (batch.rows,) or value.is_complex():
            raise InterventionError(
                f"metric={self.name} gave {value.dtype} {list(value.shape)} for logits {list(logits.shape)}: must be "
                f"one number a row, [{batch.rows}]"
            )
        rows = value.to("cpu", torch.float64)
        if bool(rows.isnan().any()):
            raise InterventionError(f"metric={self.name} is nan in batch {number}, {what}: there is nothing to score")
        return rows


def metric_of(metric: object, targets: object, batches: Sequence[Batch], model: nn.Module) -> Metric:
    """The metric that a user chose: a built-in one by its name, or a callable.

    Args:
        targets: what a built-in metric is about: see `score_heads`.
        model: its own loss shows whether labels are those of the next position.

    Raises:
        InterventionError: an unknown metric, invalid targets, or a position without a target.
    """
    none: list[Tensor | None] = [None] * len(batches)
    if callable(metric):
        if targets is not None:
            raise InterventionError("targets: must be None with a metric of your own, which can hold its own")
        named: Any = metric if hasattr(metric, "__qualname__") else type(metric)
        return Metric(named.__name__, _own_metric(metric), none, f"{named.__module__}.{named.__qualname__}")
    if not isinstance(metric, str) or metric not in BUILT_IN:
        raise InterventionError(f"metric={shown(metric)}: must be a callable or one of {', '.join(BUILT_IN)}")
    compute, width = BUILT_IN[metric]
    if targets is None and metric == "loss":
        if not any(batch.labels_given for batch in batches):  # the next tokens, or the model is refused
            _check_labels([batch.labels for batch in batches])
        labels = labels_of(model, batches)
        _check_labels(labels)
        return Metric(metric, compute, none, labels=labels)
    if (targets is None) != (width == 0):
        needed = ("None", "a word's id, or one a row", "two words' ids (for, against), or two a row")[width]
        raise InterventionError(f"targets={shown(targets)}: metric={metric!r} takes {needed}")
    return Metric(metric, compute, none if targets is None else _split(targets, width, batches, vocabulary_size(model)))


def _own_metric(metric: Callable[..., Any]) -> Callable[[Tensor, Situation], Any]:
    """`metric(logits, inputs)` where it has a second argument that is needed or called `inputs`, else of logits."""
    try:
        parameters = list(inspect.signature(metric).parameters.values())
    except (TypeError, ValueError):  # a builtin
        parameters = []
    positional = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    second = positional[1] if len(positional) > 1 else None
    if second and (second.name == "inputs" or second.default is inspect.Parameter.empty):
        return lambda logits, situation: metric(logits, copied(situation.batch.given))
    return lambda logits, situation: metric(logits)


def _check_labels(labels: Sequence[Tensor | None]) -> None:
    for number, one in enumerate(labels):
        if one is None:
            raise InterventionError(
                f"batch {number} does not tell the next tokens that metric='loss' is of: give labels among the "
                "arguments (they are shifted here if the model's own loss shifts them), or targets="
            )
        without = (one == IGNORED).all(1)
        if bool(without.any()):
            raise InterventionError(
                f"row {int(without.nonzero()[0])} of batch {number} has no next token at its positions (the last "
                "token has none): give targets=, or other positions"
            )


def _split(targets: object, width: int, batches: Sequence[Batch], words: int | None) -> list[Tensor]:
    """The targets `[row, width]` of each batch, of those of all rows or of one for all."""
    counts = [batch.rows for batch in batches]
    total = sum(counts)
    shapes = [(), (total,)] if width == 1 else [(width,), (total, width)]
    try:
        ids = torch.as_tensor(targets).cpu()
    except (TypeError, ValueError, RuntimeError):
        ids = torch.empty(())
    if ids.dtype not in (torch.int64, torch.int32, torch.int16) or ids.shape not in shapes:
        allowed = " for all rows, or ".join(f"[{', '.join(map(str, shape))}]" for shape in shapes)
        raise InterventionError(f"targets={shown(targets)}: must be ids {allowed}, ints")
    if int(ids.min()) < 0 or (words is not None and int(ids.max()) >= words):
        raise InterventionError(f"targets={shown(targets)}: must be ids in 0 to {'…' if words is None else words - 1}")
    rows = ids.expand(shapes[1]) if ids.shape == shapes[0] else ids
    return list(rows.reshape(total, width).long().split(counts))


def log_probabilities(logits: Tensor) -> Tensor:
    """Of `logits` `[..., word]`, in float32 at least."""
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """Each row's mean of `values` `[row, position]` over those that are counted."""
    counted = counted.to(values.device)
    return torch.where(counted, values, 0).double().sum(1) / counted.sum(1)


def _real(batch: Batch) -> Tensor:
    """The positions that count: the real ones, or all where the user named padding alone."""
    return batch.real | ~batch.real.any(1, keepdim=True)


def _at_targets(values: Tensor, targets: Tensor | None) -> Tensor:
    """Of `values` `[row, position, word]` those of the row's targets, `[row, position, target]`."""
    assert targets is not None
    return values.gather(-1, targets.to(values.device)[:, None].expand(-1, values.shape[1], -1))


def _logit_difference(logits: Tensor, situation: Situation) -> Tensor:
    found = _at_targets(logits, situation.targets).double()
    return _mean(found[..., 0] - found[..., 1], _real(situation.batch))


def _probability(logits: Tensor, situation: Situation) -> Tensor:
    found = _at_targets(log_probabilities(logits), situation.targets)
    return _mean(found[..., 0].exp(), _real(situation.batch))


def _loss(logits: Tensor, situation: Situation) -> Tensor:
    batch = situation.batch
    if situation.targets is not None:
        found = _at_targets(log_probabilities(logits), situation.targets)
        return _mean(-found[..., 0], _real(batch))
    assert situation.labels is not None
    labels = situation.labels.to(logits.device)
    exact = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(exact.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return _mean(losses.view(labels.shape), labels != IGNORED)


def _kl(logits: Tensor, situation: Situation) -> Tensor:
    clean, frozen = log_probabilities(situation.clean), log_probabilities(logits)
    terms = torch.where(clean == -torch.inf, 0, clean.exp() * (clean - frozen))
    return _mean(terms.sum(-1), _real(situation.batch))


BUILT_IN: Mapping[str, tuple[Callable[[Tensor, Situation], Tensor], int]] = {
    "logit_difference": (_logit_difference, 2),
    "loss": (_loss, 1),
    "kl": (_kl, 0),
    "probability": (_probability, 1),
}
"""Each built-in metric and how many targets a row has."""
