"""Arguments that several studies have, and what none can make a mean of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from freeze_core.attention.layout import Sites
from freeze_core.config import InterventionConfig
from freeze_core.errors import InterventionError, shown
from freeze_core.freezing.requests import resolve

__all__ = ["heads_by_layer", "refuse_equal", "refuse_infinite"]


def heads_by_layer(heads: object, config: InterventionConfig, sites: Sites) -> dict[int, list[int]]:
    """Query heads of each layer, `{layer: [heads]}`, all counted from the start and in order.

    Raises:
        InterventionError: no such mapping, or a layer or a head that is not there or is named twice.
    """
    if not isinstance(heads, Mapping) or not heads:
        raise InterventionError(f"heads={shown(heads)}: must be a dict from layer to a list of heads, not empty")
    chosen: dict[int, list[int]] = {}
    for layer, several in heads.items():
        (freeze,) = resolve(replace(config, layer_indices=[layer], head_indices=several), sites)
        if freeze.layer in chosen:
            raise InterventionError(f"heads={shown(dict(heads))}: names the same layer twice")
        chosen[freeze.layer] = sorted(freeze.heads)
    return dict(sorted(chosen.items()))


def refuse_infinite(rows: Tensor, metric: str, number: int, where: str) -> Tensor:
    """`rows` `[row]` of a metric in batch `number`, if they are finite.

    Raises:
        InterventionError: they are not.
    """
    if not bool(rows.isfinite().all()):
        row = int((~rows.isfinite()).nonzero()[0])
        raise InterventionError(
            f"metric={metric} is {float(rows[row])} for row {row} of batch {number}, {where}: there is no mean of it; "
            "measure something that is finite"
        )
    return rows


def refuse_equal(metric: str, rows: Tensor, others: Tensor, where: str) -> None:
    """Raises `InterventionError` where two means of a metric are the same, so that no share of their gap is known.

    Args:
        rows, others: `[prompt]`.
        where: of what they are.
    """
    if float((rows - others).mean()) == 0:
        raise InterventionError(
            f"metric={metric} is {float(rows.mean()):.6g} {where}, the same in the mean: there is no gap between them "
            "that could be restored or broken; give prompts, targets or a metric that tell them apart"
        )
