"""The inputs of a sweep, read and checked before any forward: which rows, which columns, which positions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from freeze_core.errors import InterventionError, shown
from freeze_core.freezing.pass_arguments import find_cache
from freeze_core.inputs import model_arguments

__all__ = ["IGNORED", "Batch", "batches_of", "copied"]

IGNORED = -100
"""The label of a position that has no target, as in transformers."""


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch.

    Args:
        given: a copy of what the user gave.
        arguments: a copy of what the model is called with.
        rows, columns: of the logits.
        positions: the columns of each row that the metric is handed, `[row, position]`.
        everywhere: whether they are all columns.
        mask: which tokens are not padding, `[row, column]` bool.
        real: which of the positions are not padding, `[row, position]` bool.
        tokens: the labels as they were given, the tokens where none were, `[row, column]`, `IGNORED` at padding; `None`
            where neither are known.
        labels_given: whether they were given.
        decodes: whether the model is an encoder and a decoder.
        labels: the token that each position is to predict `[row, position]`, `IGNORED` where there is none; `None` if
            not known. Until `freeze_core.scoring.labels` has asked the model it is the next one, of a decoder alone.
    """

    given: Tensor | Mapping[str, Any]
    arguments: Mapping[str, Any]
    rows: int
    columns: int
    positions: Tensor
    everywhere: bool
    mask: Tensor
    real: Tensor
    tokens: Tensor | None
    labels_given: bool
    decodes: bool
    labels: Tensor | None

    @property
    def own_labels(self) -> Tensor | None:
        """At each position the label of its own `[row, position]`."""
        return None if self.tokens is None else self.tokens.gather(1, self.positions)

    @property
    def next_labels(self) -> Tensor | None:
        """At each position the label of the next column `[row, position]`."""
        if self.tokens is None:
            return None
        nothing = torch.full((len(self.tokens), 1), IGNORED)
        following = torch.cat([self.tokens[:, 1:], nothing], dim=1)
        # Behind padding there is no next token, whatever stands there.
        return following.masked_fill(~self.mask, IGNORED).gather(1, self.positions)

    def at_positions(self, values: Tensor) -> Tensor:
        """Of `values` `[row, column, ...]` those of the positions, `[row, position, ...]`."""
        return values if self.everywhere else values[self.index(values.device)]

    @property
    def by_token(self) -> bool:
        """Whether all tensors that the model is given are `[row, column, ...]`, so that rows can be put below them."""
        tensors = [value for value in self.arguments.values() if isinstance(value, Tensor)]
        return all(value.shape[:2] == (self.rows, self.columns) for value in tensors)

    def copies(self, count: int) -> Batch:
        """What a pass needs of the batch, so many times, one below the other. No metric is computed of copies."""
        arguments = {
            name: torch.cat([value] * count) if isinstance(value, Tensor) else value
            for name, value in self.arguments.items()
        }
        return replace(self, arguments=arguments, rows=self.rows * count, positions=torch.cat([self.positions] * count))

    def index(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The row and the column of each position, as an index of values on `device`."""
        return torch.arange(self.rows, device=device)[:, None], self.positions.to(device)


def copied(value: Any) -> Any:
    """A value of the same type with tensors of its own: what writes to it, a metric or a hook say, changes no other."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, list) or type(value) is tuple:
        return type(value)(copied(one) for one in value)
    if isinstance(value, MutableMapping):
        whole = copy(value)
        for name in value:
            whole[name] = copied(value[name])
        return whole
    return {name: copied(value[name]) for name in value} if isinstance(value, Mapping) else value


def batches_of(model: nn.Module, inputs: object, positions: object) -> list[Batch]:
    """The batches in `inputs`.

    Args:
        inputs: token ids `[batch, token]`, embeddings, a dict of model arguments, or an iterable of any of these.
        positions: `all`, `last` (the last real token of each row, wherever padding is), or columns, padding counted,
            negative ones from the end.

    Raises:
        InterventionError: inputs that are none, a cache among them, or positions that are out of range.
    """
    if not isinstance(inputs, Iterable) or isinstance(inputs, str | bytes):
        raise InterventionError(
            f"inputs={shown(inputs)}: must be token ids, a dict of model arguments, or some of them"
        )
    listed = [inputs] if isinstance(inputs, Tensor | Mapping) else list(inputs)
    if not listed:
        raise InterventionError("inputs is empty: give at least one batch of token ids")
    _check_positions(positions)
    return [_batch(model, given, positions) for given in listed]


def _check_positions(positions: object) -> None:
    if isinstance(positions, str) and positions in ("all", "last"):
        return
    columns = [] if isinstance(positions, str | bytes) or not isinstance(positions, Sequence) else list(positions)
    if not columns or any(isinstance(one, bool) or not isinstance(one, Integral) for one in columns):
        raise InterventionError(f"positions={shown(positions)}: must be 'all', 'last' or a list of columns (ints)")


def _batch(model: nn.Module, given: Any, positions: Any) -> Batch:
    if find_cache(model_arguments(model, given), type(model).__name__) is not None:
        raise InterventionError("inputs hold a cache, which every pass would fill further: give whole sequences")
    given = copied(given)
    arguments = copied(model_arguments(model, given))
    decodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    inputs = _inputs_of_logits(arguments, decodes)
    mask = _padding_mask(arguments, decodes, *inputs.shape[:2])
    columns = _columns(positions, mask)
    batch = Batch(
        given=given,
        arguments=arguments,
        rows=mask.shape[0],
        columns=mask.shape[1],
        positions=columns,
        everywhere=positions == "all",
        mask=mask,
        real=mask.gather(1, columns),
        tokens=_labels(arguments, decodes, inputs, mask),
        labels_given=arguments.get("labels") is not None,
        decodes=decodes,
        labels=None,
    )
    if not decodes:  # they would have the model take a loss of its own, of all positions
        arguments.pop("labels", None)
    return replace(batch, labels=batch.own_labels if decodes else batch.next_labels)


def _inputs_of_logits(arguments: Mapping[str, Any], decodes: bool) -> Tensor:
    """The argument that has the rows and columns of the logits."""
    own = ("decoder_input_ids", "decoder_inputs_embeds", "labels") if decodes else ()
    for name in (*own, "input_ids", "inputs_embeds"):
        value = arguments.get(name)
        if isinstance(value, Tensor) and value.dim() >= 2 and value.numel():
            return value
    raise InterventionError(f"inputs={shown(list(arguments))}: must hold input_ids [batch, token], not empty")


def _padding_mask(arguments: Mapping[str, Any], decodes: bool, rows: int, columns: int) -> Tensor:
    """Which tokens are real `[row, column]` bool, on the CPU."""
    name = "decoder_attention_mask" if decodes else "attention_mask"
    mask = arguments.get(name)
    if mask is None:
        return torch.ones(rows, columns, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.shape != (rows, columns):
        raise InterventionError(f"{name} is {_shape(mask)}: must be a padding mask {[rows, columns]} [batch, token]")
    real = mask.detach().cpu().bool()
    if not bool(real.any(1).all()):
        raise InterventionError(f"{name}: row {int((~real.any(1)).nonzero()[0])} has no real token; leave it out")
    return real


def _labels(arguments: Mapping[str, Any], decodes: bool, inputs: Tensor, mask: Tensor) -> Tensor | None:
    """The labels, or the tokens of a decoder without labels, `[row, column]`; `IGNORED` at padding."""
    labels = arguments.get("labels")
    if labels is None:
        if decodes or inputs.is_floating_point() or inputs.dim() > 2:
            return None  # the inputs of such a decoder are the labels, shifted to the right
        labels = inputs
    if not isinstance(labels, Tensor) or labels.shape != mask.shape:
        raise InterventionError(f"labels is {_shape(labels)}: must be {list(mask.shape)} [batch, token]")
    return labels.detach().cpu().long().masked_fill(~mask, IGNORED)


def _shape(value: object) -> object:
    return list(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _columns(positions: Any, mask: Tensor) -> Tensor:
    """The columns of the positions `[row, position]`."""
    rows, columns = mask.shape
    if positions == "all":
        return torch.arange(columns).expand(rows, -1)
    if positions == "last":
        return (torch.arange(columns) * mask).argmax(1, keepdim=True)
    for column in positions:
        if not -columns <= column < columns:
            raise InterventionError(
                f"positions={shown(positions)}: {column} is out of range; a batch has {columns} columns"
            )
    chosen = [int(column) % columns for column in positions]
    if len(set(chosen)) < len(chosen):
        raise InterventionError(f"positions={shown(positions)}: names the same of {columns} columns twice")
    return torch.tensor(chosen).expand(rows, -1)
