"""Reads which rows an engine takes for which, its own choice, by letting it resample everything."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pytest_circuitfreeze.strategies import Batch, vocabulary
from pytest_circuitfreeze.suites.judge.observed_passes import run_pass
from pytest_circuitfreeze.suites.judge.site_lookup import sites
from pytest_circuitfreeze.suites.refusals import Refused

if TYPE_CHECKING:
    from pytest_circuitfreeze.engines import Engine

__all__ = ["Order", "distinct_rows", "read_orders"]


class Order(NamedTuple):
    """Which row takes the place of each, in one part of one layer.

    Args:
        rows: `[head, row]`, the row whose activation is nearest to what was found.
        error: `[head, row]`, how far the two are apart.
        size: the largest absolute value of these activations.
    """

    rows: Tensor
    error: Tensor
    size: float


def distinct_rows(model: PreTrainedModel, rows: int, columns: int, start: int = 0) -> Batch:
    """A batch without padding that has no token twice in one column, as far as the vocabulary goes."""
    ids = torch.arange(start, start + rows * columns).reshape(rows, columns)
    return Batch(ids % vocabulary(model))


def read_orders(
    engine: Engine, model: PreTrainedModel, seed: int, batch: Batch, layers: list[int] | None = None
) -> dict[tuple[int, str], Order]:
    """By layer and role (or part of one), which rows `engine` takes for which under `seed`.

    Layers are frozen one at a time: up to its own activations each is the unfrozen one. One that the engine refuses
    to freeze is left out.

    Raises:
        Refused: the engine refuses all of them.
    """
    from freeze_core import InterventionConfig

    known = sites(model)
    clean = run_pass(engine, model, None, batch).layers
    orders = {}
    refusal = None
    for layer in known if layers is None else layers:
        config = InterventionConfig(layer_indices=[layer], freeze_type="resample", seed=seed)
        try:
            frozen = run_pass(engine, model, config, batch).layers[layer]
        except Refused as refused:
            refusal = refused
            continue
        for name in known[layer].parts:
            # [head, row, token, feature], one for each head that the part has
            got, own = (seen.activation(name).double().permute(2, 0, 1, 3) for seen in (frozen, clean[layer]))
            apart = (got[:, :, None] - own[:, None, :]).abs().flatten(3).amax(-1)  # [head, row, other row]
            error, rows = apart.min(-1)
            orders[layer, name] = Order(rows, error, float(own.abs().max()))
    if refusal is not None and not orders:
        raise refusal
    return orders
