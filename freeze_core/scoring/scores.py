"""What a sweep gives: a score for each head of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from freeze_core.extras import extra

__all__ = ["HeadScores"]


@dataclass(frozen=True, eq=False)
class HeadScores:
    """Scores of heads.

    Args:
        scores: for each circuit a tensor `[layer, head]` in float64: the metric with this head's circuit frozen minus
            the metric without, each a mean over all rows. nan where there is no head, or none that was asked for.
        clean: the metric of the unfrozen model, mean over all rows.
        metric: its name.
        method: how the scores were computed.
        rows: over how many rows.
    """

    scores: Mapping[str, Tensor]
    clean: float
    metric: str
    method: str
    rows: int

    def to_frame(self) -> Any:
        """A pandas `DataFrame` with one row a score: `circuit`, `layer`, `head`, `score`.

        Raises:
            ImportError: pandas is not installed.
        """
        pandas = extra("pandas", "to_frame makes a pandas DataFrame; HeadScores.scores has the same numbers")
        scored = [
            (circuit, layer, head, float(scores[layer, head]))
            for circuit, scores in self.scores.items()
            for layer, head in (~scores.isnan()).nonzero().tolist()
        ]
        return pandas.DataFrame(scored, columns=["circuit", "layer", "head", "score"])
