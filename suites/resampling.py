"""Resampling: the same column of another row, by a derangement that the seed alone decides."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from pytest_circuitfreeze.suites.claims import Claim, Margin, check
from pytest_circuitfreeze.suites.judge.observed_passes import logits_of
from pytest_circuitfreeze.suites.judge.resampled_rows import distinct_rows, read_orders
from pytest_circuitfreeze.suites.tolerance import gamma
from pytest_circuitfreeze.wrapped import dtype_of

if TYPE_CHECKING:
    from pytest_circuitfreeze.engines import Engine

__all__ = ["check_resampling_takes_other_rows"]


@check
def check_resampling_takes_other_rows(engine: Engine, model: PreTrainedModel, seed: int, rows: int) -> Margin:
    """Each row has the same columns of one other row, no row is taken twice, and which is which stays.

    Whether layers, activations and heads take the same row is left to the engine; it must be the same on every pass,
    whatever the tokens are and however many.

    Raises:
        ClaimBroken: it is none of them, a row is its own or is taken twice, or another pass takes other rows.
    """
    from freeze_core import InterventionConfig

    claim = Claim("resampling takes other rows")
    batch = distinct_rows(model, rows, 4)
    first = read_orders(engine, model, seed, batch)
    again = read_orders(engine, model, seed, distinct_rows(model, rows, 6, start=40))
    for (layer, name), order in first.items():
        bound = gamma(8, dtype_of(model)) * order.size
        due = torch.zeros_like(order.error)
        claim.within(f"distance of {name} from another row's", order.error, due, bound, "head row", layer=layer)
        for head, taken in enumerate(order.rows.tolist()):
            claim.demand(sorted(taken) == list(range(rows)), f"{name} takes rows {taken}", layer=layer, head=head)
            kept = [row for row, own in enumerate(taken) if own == row]
            claim.demand(not kept, f"{name} keeps rows {kept}", layer=layer, head=head)
        took, takes = order.rows.tolist(), again[layer, name].rows.tolist()
        claim.demand(took == takes, f"{name} takes rows {took}, then {takes}", layer=layer)
    config = InterventionConfig(layer_indices=sorted({layer for layer, _ in first}), freeze_type="resample", seed=seed)
    with torch.no_grad(), engine.freeze(model, config) as frozen:
        one, two = (logits_of(frozen, model, batch) for _ in range(2))
    claim.same("logits of a repeated pass", two, one, "row position word")
    return claim.margin
