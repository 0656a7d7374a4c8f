"""The screened sweep: all heads estimated, the best and a few drawn ones computed exactly, the rest bounded by these.

What the estimates err by is seen in heads that are drawn from all but the best, each as likely as any other: a further
one of those errs by more than the largest error among `n` drawn ones with a probability of at most `1 / (n + 1)`,
whatever the errors are distributed like (V. Vovk, A. Gammerman and G. Shafer, "Algorithmic learning in a random world",
2005). The best are no such sample: they have larger scores, and err by more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from freeze_core.scoring.attribution import attribution
from freeze_core.scoring.exact import exact
from freeze_core.scoring.sweep import Intervention, Sweep

__all__ = ["Screening", "screened"]

DRAWN = 0.25
"""The share of what may be computed exactly that goes to drawn heads."""

ESTIMATING = 4
"""The passes that estimates take besides one a circuit: the clean one, back through it, and what tells heads apart."""

OVERHEAD = 6
"""The passes that a sweep of few heads takes besides its freezes: the clean one, those that find out where others may
start, and about two or three for the unembedding, which is done once a layer."""

Placed = tuple[int, Intervention]
"""An intervention and its layer."""


@dataclass(frozen=True, eq=False)
class Screening:
    """What a screened sweep found.

    Args:
        scores: by circuit `[layer, head]`, exact or estimated.
        clean: the metric of the clean passes.
        exact: by circuit `[layer, head]` bool, which scores are exact.
        rest: by circuit the largest absolute score of a head that is estimated, if it errs by no more than those drawn.
        confidence: by circuit, with which probability a further head drawn as they were does so, at least.
    """

    scores: Mapping[str, Tensor]
    clean: float
    exact: Mapping[str, Tensor]
    rest: Mapping[str, float]
    confidence: Mapping[str, float]


class Board:
    """The scores by circuit `[layer, head]` as they are known so far, and what can be said of those not yet exact."""

    def __init__(self, estimates: Mapping[str, Tensor], top: int) -> None:
        self.scores = {circuit: scores.clone() for circuit, scores in estimates.items()}
        self.exact = {circuit: torch.zeros_like(scores, dtype=torch.bool) for circuit, scores in estimates.items()}
        self._estimates = estimates
        self._top = top
        self._ranks = {circuit: _ranks(scores) for circuit, scores in estimates.items()}

    def rank(self, placed: Placed) -> int:
        """The best rank that an intervention has in a circuit, 0 the largest estimate."""
        layer, one = placed
        return min(int(self._ranks[circuit][layer, head]) for circuit, head in one.heads)

    def put(self, measured: Mapping[str, Tensor]) -> None:
        """Takes in exact scores, nan where there are none."""
        for circuit, scores in measured.items():
            known = ~scores.isnan()
            self.scores[circuit][known] = scores[known]
            self.exact[circuit] |= known

    def error(self, drawn: Sequence[Placed]) -> dict[str, float]:
        """The largest error of the estimates of drawn interventions, by circuit; inf where none was drawn."""
        errors: dict[str, float] = dict.fromkeys(self.scores, -torch.inf)
        for layer, one in drawn:
            for circuit, head in one.heads:
                error = abs(float(self.scores[circuit][layer, head] - self._estimates[circuit][layer, head]))
                errors[circuit] = max(errors[circuit], error)
        return {circuit: error if error >= 0 else torch.inf for circuit, error in errors.items()}

    def least(self, circuit: str) -> float:
        """The least absolute score among the best so far, of those that are exact."""
        known = self.scores[circuit][self.exact[circuit]].abs().sort(descending=True).values
        return float(known[: self._top][-1]) if len(known) else 0.0

    def may_enter(self, placed: Placed, errors: Mapping[str, float]) -> bool:
        """Whether an intervention may be among the best of a circuit, if its estimate errs by no more than `errors`."""
        layer, one = placed
        return any(
            abs(float(self._estimates[circuit][layer, head])) + errors[circuit] >= self.least(circuit)
            for circuit, head in one.heads
        )

    def knows(self, placed: Placed) -> bool:
        """Whether an intervention was computed exactly."""
        layer, one = placed
        circuit, head = one.heads[0]
        return bool(self.exact[circuit][layer, head])

    def confidence(self, drawn: Sequence[Placed]) -> dict[str, float]:
        """By circuit, how probable it is at least that a further head drawn errs by no more than those drawn."""
        return {
            circuit: n / (n + 1) if bool(self._left(circuit).any()) else 1.0
            for circuit in self.scores
            for n in [sum(circuit in dict(one.heads) for _, one in drawn)]
        }

    def _left(self, circuit: str) -> Tensor:
        """Which heads of a circuit are estimated only, `[layer, head]` bool."""
        return ~self.exact[circuit] & ~self._estimates[circuit].isnan()

    def rest(self, errors: Mapping[str, float]) -> dict[str, float]:
        """By circuit, the largest absolute score of those that are not exact, if they err by no more than `errors`."""
        bounds = {}
        for circuit, estimates in self._estimates.items():
            left = estimates[self._left(circuit)].abs()
            bounds[circuit] = float(left.max()) + errors[circuit] if len(left) else 0.0
        return bounds


def screened(sweep: Sweep, ig_steps: int, top: int, budget: float) -> Screening:
    """Estimates all, and computes exactly the `top` best of each circuit and what `budget` allows of further ones.

    Args:
        top: those of each circuit that are to be found.
        budget: the share of the layers that an exact sweep runs that may be run, the estimates' own counted.
    """
    estimates, clean = attribution(sweep, ig_steps)
    board = Board(estimates, top)
    ranked = sorted(sweep.placed, key=board.rank)
    layers = sweep.sites.layers

    def layers_run(some: Sequence[Placed]) -> int:
        return sum(layers - layer for layer, _ in some)

    def measure(some: Sequence[Placed]) -> None:
        chosen = {layer: [one for one in several if (layer, one) in some] for layer, several in sweep.wanted.items()}
        board.put(exact(replace(sweep, wanted={layer: several for layer, several in chosen.items() if several}))[0])

    best = [placed for placed in ranked if board.rank(placed) < top]
    others = ranked[len(best) :]
    estimating = layers * (ESTIMATING + len(sweep.circuits) * (1 + 3 * ig_steps * len(sweep.wanted)))
    allowed = budget * layers_run(ranked) - estimating - 2 * OVERHEAD * layers
    # As many as cost so much on average: what any one of them costs must not decide whether it is among them.
    number = int(max(0, DRAWN * allowed * len(others)) // max(1, layers_run(others)))
    drawn = [others[i] for i in np.random.default_rng(0).permutation(len(others))[:number]]
    measure([*best, *drawn])
    errors = board.error(drawn)
    left = [placed for placed in others if not board.knows(placed) and board.may_enter(placed, errors)]
    further = _first(left, allowed - layers_run([*best, *drawn]), layers_run)
    if further:
        measure(further)
    return Screening(board.scores, clean, board.exact, board.rest(errors), board.confidence(drawn))


def _first(some: Sequence[Placed], allowed: float, layers_run: Callable[[Sequence[Placed]], int]) -> list[Placed]:
    """The first of `some` that run no more layers than `allowed`."""
    chosen: list[Placed] = []
    for placed in some:
        allowed -= layers_run([placed])
        if allowed < 0:
            break
        chosen.append(placed)
    return chosen


def _ranks(scores: Tensor) -> Tensor:
    """The rank of each score `[layer, head]` by its absolute value, 0 the largest; nan last, equal ones in order."""
    order = scores.abs().nan_to_num(-1.0).flatten().argsort(descending=True, stable=True)
    return order.argsort().view(scores.shape)
