"""The screened sweep: all heads estimated, the best and a few drawn ones computed exactly, the rest bounded by these.

The errors of the estimates are seen in heads that are drawn from all but the best, each as likely as any other: a
further one of those has a larger error than the largest among `n` drawn ones with a probability of at most `1 / (n +
1)`, whatever the distribution of the errors (V. Vovk, A. Gammerman and G. Shafer, "Algorithmic learning in a random
world", 2005). The best heads are no such sample: they have larger scores, and larger errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from freeze_core.scoring.attribution import attribution
from freeze_core.scoring.exact import exact
from freeze_core.scoring.scores import HeadScores
from freeze_core.scoring.sweep import Intervention, Sweep

__all__ = ["screened"]

DRAWN = 0.25
"""The share of what may be computed exactly that goes to drawn heads."""

ESTIMATING = 4
"""The passes of estimates besides one a circuit: the clean one, back through it, and one that looks for mixed heads."""

OVERHEAD = 6
"""The passes that a sweep of few heads takes besides its freezes: the clean one, those that find out where others may
start, and about two or three for the unembedding, which is done once a layer."""

Placed = tuple[int, Intervention]
"""An intervention and its layer."""


class Candidates:
    """The scores by circuit `[layer, head]` as they are known so far, and bounds on those that are not yet exact."""

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

    def add_exact(self, measured: Mapping[str, Tensor]) -> None:
        """Takes in exact scores, nan where there are none."""
        for circuit, scores in measured.items():
            known = ~scores.isnan()
            self.scores[circuit][known] = scores[known]
            self.exact[circuit] |= known

    def largest_errors(self, drawn: Sequence[Placed]) -> dict[str, float]:
        """The largest error of the estimates of drawn interventions, by circuit; inf where none was drawn."""
        errors: dict[str, list[float]] = {circuit: [] for circuit in self.scores}
        for layer, one in drawn:
            for circuit, head in one.heads:
                errors[circuit].append(abs(float((self.scores[circuit] - self._estimates[circuit])[layer, head])))
        return {circuit: max(found, default=torch.inf) for circuit, found in errors.items()}

    def may_enter(self, placed: Placed, errors: Mapping[str, float]) -> bool:
        """Whether an intervention may be among the best of a circuit, if its error is at most `errors`."""
        layer, one = placed
        return any(
            abs(float(self._estimates[circuit][layer, head])) + errors[circuit] >= self._least_of_top(circuit)
            for circuit, head in one.heads
        )

    def is_exact(self, placed: Placed) -> bool:
        """Whether an intervention was computed exactly."""
        layer, one = placed
        circuit, head = one.heads[0]
        return bool(self.exact[circuit][layer, head])

    def confidence(self, drawn: Sequence[Placed]) -> dict[str, float]:
        """By circuit the probability, at least, that the error of a further head is at most that of those drawn."""
        counts = {circuit: sum(circuit in dict(one.heads) for _, one in drawn) for circuit in self.scores}
        return {circuit: n / (n + 1) if len(self._estimated(circuit)) else 1.0 for circuit, n in counts.items()}

    def rest(self, errors: Mapping[str, float]) -> dict[str, float]:
        """By circuit the largest absolute score of those that are not exact, if their errors are at most `errors`."""
        left = {circuit: self._estimated(circuit) for circuit in self.scores}
        return {circuit: float(one.max()) + errors[circuit] if len(one) else 0.0 for circuit, one in left.items()}

    def _least_of_top(self, circuit: str) -> float:
        known = self.scores[circuit][self.exact[circuit]].abs().sort(descending=True).values
        return float(known[: self._top][-1]) if len(known) else 0.0

    def _estimated(self, circuit: str) -> Tensor:
        """The absolute estimates of the heads of a circuit that are not exact."""
        estimates = self._estimates[circuit]
        return estimates[~self.exact[circuit] & ~estimates.isnan()].abs()


def screened(sweep: Sweep, ig_steps: int, top: int, budget: float) -> HeadScores:
    """Estimates all, and computes exactly the `top` best of each circuit and what `budget` allows of further ones.

    Args:
        top: those of each circuit that are to be found.
        budget: the share of the layers that an exact sweep runs that may be run, the estimates' own counted.
    """
    estimates, clean = attribution(sweep, ig_steps)
    candidates = Candidates(estimates, top)
    ranked = sorted(sweep.placed, key=candidates.rank)
    layers = sweep.sites.layers

    def layers_run(some: Sequence[Placed]) -> int:
        return sum(layers - layer for layer, _ in some)

    def measure(some: Sequence[Placed]) -> None:
        chosen = {layer: [one for one in wanted if (layer, one) in some] for layer, wanted in sweep.wanted.items()}
        part = replace(sweep, wanted={layer: wanted for layer, wanted in chosen.items() if wanted})
        candidates.add_exact(exact(part)[0])

    best = [placed for placed in ranked if candidates.rank(placed) < top]
    others = ranked[len(best) :]
    estimating = layers * (ESTIMATING + len(sweep.circuits) * (1 + 3 * ig_steps * len(sweep.wanted)))
    allowed = budget * layers_run(ranked) - estimating - 2 * OVERHEAD * layers
    # As many as cost so much on average: what any one of them costs must not decide whether it is among them.
    number = int(max(0, DRAWN * allowed * len(others)) // max(1, layers_run(others)))
    drawn = [others[i] for i in np.random.default_rng(0).permutation(len(others))[:number]]
    measure([*best, *drawn])
    errors = candidates.largest_errors(drawn)
    allowed -= layers_run([*best, *drawn])
    further = []
    for placed in others:
        if not candidates.is_exact(placed) and candidates.may_enter(placed, errors):
            allowed -= layers_run([placed])
            if allowed < 0:
                break
            further.append(placed)
    if further:
        measure(further)
    found = (candidates.exact, candidates.rest(errors), candidates.confidence(drawn))
    return HeadScores(candidates.scores, clean, sweep.metric.name, "screened", sweep.rows, *found)


def _ranks(scores: Tensor) -> Tensor:
    """The rank of each score `[layer, head]` by its absolute value, 0 the largest; nan last, equal ones in order."""
    order = scores.abs().nan_to_num(-1.0).flatten().argsort(descending=True, stable=True)
    return order.argsort().view(scores.shape)
