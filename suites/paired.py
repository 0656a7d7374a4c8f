"""What a frozen call costs beside a plain one: CPU time, alternating in one process, one thread."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from statistics import median, quantiles
from time import process_time

Call = Callable[[], object]
Frozen = Callable[[], AbstractContextManager[Call]]

SECONDS = 0.02
"""CPU time of the plain calls of one round, at least: many ticks of the clock."""


class Pairs:
    """Ratios of CPU time to plain calls, of one model that is frozen and unfrozen again between the two.

    It is one model, since another object, its weights apart, may already cost some hundredths more or less. Each
    contender's calls stand between two stretches of plain ones; plain calls in a contender's place are the noise floor.

    Args:
        plain: what all are compared with.
        contenders: by name, a context in which a call is frozen, and that gives it.
        floor: what the plain calls are called.
        clock: seconds; CPU time where the CPU does the work.
    """

    def __init__(
        self,
        plain: Call,
        contenders: Mapping[str, Frozen],
        floor: str = "plain",
        clock: Callable[[], float] = process_time,
    ) -> None:
        self._plain = plain
        self._clock = clock
        self._contenders: dict[str, Frozen] = {floor: lambda: nullcontext(plain), **contenders}
        plain()
        start = clock()
        plain()
        self._calls = max(1, round(SECONDS / max(clock() - start, 1e-6)))
        self._ratios: dict[str, list[float]] = {name: [] for name in self._contenders}

    def rounds(self, number: int) -> None:
        """That many more ratios for each."""
        for _ in range(number):
            self.round()

    def round(self) -> None:
        """One more ratio for each."""
        before = self._stretch(self._plain)
        for name, frozen in self._contenders.items():
            with frozen() as call:
                own = self._stretch(call)
            after = self._stretch(self._plain)
            self._ratios[name].append(2 * own / (before + after))
            before = after

    def spreads(self) -> dict[str, dict[str, float]]:
        """By name: `median`, the quartiles `low` and `high`, and `n`, the number of rounds."""
        return {name: spread(ratios) for name, ratios in self._ratios.items()}

    def _stretch(self, call: Call) -> float:
        """The median of some calls, behind one that warms up."""
        call()
        times = []
        gc.disable()  # a collection would be charged to whichever call it falls into
        try:
            for _ in range(self._calls):
                start = self._clock()
                call()
                times.append(self._clock() - start)
        finally:
            gc.enable()
        return median(times)


def spread(values: list[float]) -> dict[str, float]:
    """Median, quartiles and number of some values, two at least."""
    low, _, high = quantiles(values, n=4, method="inclusive")
    return {"median": median(values), "low": low, "high": high, "n": len(values)}
