"""What a sweep gives: a score for each head of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
        exact: for each circuit a tensor `[layer, head]` bool: which scores are those of a freeze in a pass of its own;
            the others are estimates.
        rest: of a screened sweep, for each circuit the largest absolute score of any head that was only estimated, if
            its estimate errs by no more than those did that were drawn to find that out; 0 if there is none.
        confidence: of a screened sweep, for each circuit how probable it is at least that a further head, drawn as
            those were from all but the largest estimates, errs by no more: `n / (n + 1)` for `n` drawn. It is said of a
            head, not of all at once, and not of those that are left after the likeliest were computed.
    """

    scores: Mapping[str, Tensor]
    clean: float
    metric: str
    method: str
    rows: int
    exact: Mapping[str, Tensor] = field(default_factory=dict)
    rest: Mapping[str, float] = field(default_factory=dict)
    confidence: Mapping[str, float] = field(default_factory=dict)

    def to_frame(self) -> Any:
        """A pandas `DataFrame` with one row a score: `circuit`, `layer`, `head`, `score`, and whether it is `exact`.

        Raises:
            ImportError: pandas is not installed.
        """
        pandas = extra("pandas", "to_frame makes a pandas DataFrame; HeadScores.scores has the same numbers")
        scored = [
            (circuit, layer, head, float(scores[layer, head]), self._is_exact(circuit, layer, head))
            for circuit, scores in self.scores.items()
            for layer, head in (~scores.isnan()).nonzero().tolist()
        ]
        return pandas.DataFrame(scored, columns=["circuit", "layer", "head", "score", "exact"])

    def _is_exact(self, circuit: str, layer: int, head: int) -> bool:
        return bool(self.exact[circuit][layer, head]) if circuit in self.exact else self.method == "exact"
