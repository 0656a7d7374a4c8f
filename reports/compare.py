"""What differs between two runs: what they ran under, which claims came out otherwise, and what costs more or less.

A benchmark is said to cost more only beyond the noise of both runs, which they tell themselves: by the quartiles of
what was measured, and by how far plain calls were from costing as much as plain calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from tabulate import tabulate

from pytest_circuitfreeze import matrix
from pytest_circuitfreeze.benchmarks import Benchmark, shown
from pytest_circuitfreeze.matrix import NOT_RUN, WORDS
from pytest_circuitfreeze.reports.document import Report
from pytest_circuitfreeze.reports.markdown import escape
from pytest_circuitfreeze.reports.markdown import shown as setting
from pytest_circuitfreeze.results import WITHOUT_MODEL, Result

BAD = {WORDS["failed"], WORDS["error"]}
NOISES = 3.0
"""How many times its noise a difference of medians is, to be told."""
BETWEEN = 0.02
"""What a run of its own adds to that noise, as a share: the same code, started twice, differs by some hundredths."""


class Change(NamedTuple):
    """A claim on a model that came out otherwise."""

    claim: str
    model: str
    old: str
    new: str
    message: str

    @property
    def worse(self) -> bool:
        """Whether it fails, and did not before."""
        return self.new in BAD and self.old not in BAD


class Slower(NamedTuple):
    """A benchmark whose cost differs beyond the noise."""

    name: str
    old: str
    new: str
    ratio: float
    """Of the new cost to the old one."""
    noise: float
    """What the two runs' own spread makes of that ratio, as a share: 0.05 is 5 %."""

    @property
    def worse(self) -> bool:
        """Whether it costs more."""
        return self.ratio > 1


class Comparison(NamedTuple):
    """All that differs."""

    conditions: list[tuple[str, str, str]]
    claims: list[Change]
    costs: list[Slower]

    @property
    def worse(self) -> bool:
        """Whether something got worse."""
        return any(one.worse for one in self.claims) or any(one.worse for one in self.costs)


def compare(old: Report, new: Report) -> Comparison:
    """What differs from an old run to a new one."""
    return Comparison(_conditions(old, new), _claims(old, new), _costs(old.benchmarks, new.benchmarks))


def render(found: Comparison) -> str:
    """The comparison as Markdown, the worst first; empty where nothing differs."""
    parts = []
    worse = [one for one in found.claims if one.worse]
    other = [one for one in found.claims if not one.worse]
    for title, changes in (("Worse", worse), ("Otherwise", other)):
        rows = [[escape(matrix.words(one.claim)), escape(one.model), one.old, one.new] for one in changes]
        parts += [f"## {title}", _table(rows, ["claim", "model", "old", "new"])] if rows else []
        parts += [
            f"- {escape(one.claim)}, {escape(one.model)}: {escape(one.message)}" for one in changes if one.message
        ]
    costs = sorted(found.costs, key=lambda one: -one.ratio)
    rows = [[escape(one.name), one.old, one.new, f"{one.ratio:.3f}", f"± {one.noise:.1%}"] for one in costs]
    parts += ["## Costs", _table(rows, ["benchmark", "old", "new", "new / old", "noise"])] if rows else []
    rows = [[escape(name), setting(before), setting(after)] for name, before, after in found.conditions]
    parts += ["## Run under", _table(rows, ["", "old", "new"])] if rows else []
    return "\n\n".join(parts) + "\n" if parts else ""


def _table(rows: list[list[str]], heads: list[str]) -> str:
    return tabulate(rows, heads, tablefmt="github", disable_numparse=True)


def _conditions(old: Report, new: Report) -> list[tuple[str, str, str]]:
    before, after = ({**one.environment, **one.settings, "complete": one.ended.complete} for one in (old, new))
    return [
        (name, before.get(name, "-"), after.get(name, "-"))
        for name in dict.fromkeys([*before, *after])
        if before.get(name, "-") != after.get(name, "-")
    ]


def _claims(old: Report, new: Report) -> list[Change]:
    before, after = _words(old), _words(new)
    messages = {_key(one): one.message for one in new.everything if one.message}
    return [
        Change(*key[1:], before.get(key, NOT_RUN), after.get(key, NOT_RUN), messages.get(key, ""))
        for key in dict.fromkeys([*before, *after])
        if before.get(key, NOT_RUN) != after.get(key, NOT_RUN)
    ]


def _words(report: Report) -> dict[tuple[str, str, str], str]:
    """What the matrix says of each claim on each model, and the like of each benchmark."""
    found: dict[tuple[str, str, str], list[Result]] = {}
    for result in report.everything:
        found.setdefault(_key(result), []).append(result)
    return {key: matrix.cell(several, key[2]) for key, several in found.items()}


def _key(result: Result) -> tuple[str, str, str]:
    """File, claim and model; a benchmark is told by its whole name."""
    claim = result.id.rpartition("::")[2] if result.is_benchmark else result.claim
    return result.file, claim, result.model or WITHOUT_MODEL


def _costs(old: Iterable[Benchmark], new: Iterable[Benchmark]) -> list[Slower]:
    before, after = _by_name(old), _by_name(new)
    pairs = ((name, before[name], after[name]) for name in before if name in after)
    return [told for name, first, second in pairs if (told := _cost(name, first, second)) is not None]


def _by_name(benchmarks: Iterable[Benchmark]) -> dict[str, Benchmark]:
    return {f"{one['group']}: {one['row']}": one for one in benchmarks}


def _cost(name: str, old: Benchmark, new: Benchmark) -> Slower | None:
    """What the engines under test cost, where they differ beyond the noise; a run without a spread has no noise."""
    first, second = (one["ratios"][one["engine"]] for one in (old, new))
    ratio = second["median"] / first["median"] if first["median"] else float("inf")
    noise = sum(_noise(one) ** 2 + BETWEEN**2 for one in (old, new)) ** 0.5
    apart = second["low"] > first["high"] or second["high"] < first["low"]
    if not apart or abs(ratio - 1) <= NOISES * noise:
        return None
    return Slower(name, shown(first), shown(second), ratio, NOISES * noise)


def _noise(one: Benchmark) -> float:
    """How far a median of one run is from what another run would find, as a share of it."""
    ratios: Mapping[str, Mapping[str, float]] = one["ratios"]
    own = ratios[one["engine"]]
    floor = next(iter(ratios.values()))  # plain calls beside plain calls
    if own["n"] == 1 or not own["median"]:
        return 0.0
    spread: float = (own["high"] - own["low"]) / own["median"] / own["n"] ** 0.5
    return spread + abs(floor["median"] - 1)
