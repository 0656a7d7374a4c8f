"""What a sweep gives: a score for each head of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from freeze_core.arguments import check_type, is_int
from freeze_core.files import Saved, as_json, check_values, parsed, under
from freeze_core.results.tables import frame

__all__ = ["HeadScores"]


@dataclass(frozen=True, eq=False)
class HeadScores(Saved):
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

    file_format = "circuitfreeze-head-scores-1"
    file_title = "head scores"

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
        rows = [
            (circuit, layer, head, float(scores[layer, head]), self._is_exact(circuit, layer, head))
            for circuit, scores in self.scores.items()
            for layer, head in (~scores.isnan()).nonzero().tolist()
        ]
        return frame(rows, ["circuit", "layer", "head", "score", "exact"])

    def _is_exact(self, circuit: str, layer: int, head: int) -> bool:
        return bool(self.exact[circuit][layer, head]) if circuit in self.exact else self.method == "exact"

    def _parts(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors = {f"scores.{name}": scores for name, scores in self.scores.items()}
        tensors |= {f"exact.{name}": exact for name, exact in self.exact.items()}
        facts = {name: getattr(self, name) for name in ("clean", "metric", "method", "rows", "rest", "confidence")}
        return tensors, as_json({"circuits": list(self.scores), **facts})

    @classmethod
    def _of_parts(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> HeadScores:
        values = {name: parsed(text) for name, text in facts.items() if name != "format"}
        circuits, exact = values.pop("circuits"), under("exact", tensors)
        scores = {name: tensors[f"scores.{name}"] for name in circuits}
        shape = scores[circuits[0]].shape
        for name, of_circuit in scores.items():
            check_values(name, of_circuit, *shape[:2], finite=False)
        if exact.keys() - scores.keys() or any(one.dtype != torch.bool or one.shape != shape for one in exact.values()):
            raise ValueError("exact must say of each score whether it is exact")
        if not isinstance(values["clean"], float) or not is_int(values["rows"]):
            raise ValueError("clean and rows must be a number and a number of rows")
        for name in ("metric", "method"):
            check_type(name, values[name], str, "a name")
        for name in ("rest", "confidence"):
            if values[name].keys() - scores.keys() or not all(
                isinstance(one, float | int) for one in values[name].values()
            ):
                raise ValueError(f"{name} must be a number for each circuit")
        return cls(scores, exact={name: exact[name] for name in circuits if name in exact}, **values)
