"""Writes `docs/mutants/README.md` from what was found and from the reasons that were written down."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from mutating import results
from mutating.making import Mutant
from mutating.results import Result

CONTEXT = 30
"""Characters of unchanged code that are shown around a change."""

WHY = {
    "equivalent": "the mutant does the same as the code",
    "performance": "it does the same, more slowly or with more memory",
    "elsewhere": "tests of other folders notice, or need what the machine of the run has not",
    "text": "only the words of an error differ",
    "gap": "no test notices, and one should",
    "not looked at": "no reason is written down yet",
}
HARMLESS = ("equivalent", "performance", "text")


class Tried(NamedTuple):
    """A mutant, what became of it, and why that is so where it survived."""

    mutant: Mutant
    result: Result
    kind: str
    reason: str


INTRODUCTION = """\
A mutant is `freeze_core` with one small change: a condition turned round, an argument left out, `a = b` become
`a = None`. It is killed where a test of `tests/freeze_core` or of the shipped suites (`quick`, on gpt2 and mistral_gqa)
then fails or runs many times longer than it should. `tox -e mutants` tries mutants, goes on where it ended, and writes
this page; `tests/mutants/mutating` is how.
"""
SCOPE = """\
The changes are mutmut's own operators, on all that runs inside functions. Not changed: annotations, decorators,
default values, what stands outside of functions (tables of families are held against the models themselves by
`tests/freeze_core/test_families.py`), and {texts} places in the words of errors and warnings. The tests of a mutant
are those that run its line: first one case of each test function, the fastest, then the next case of each, for at most
{budget:.0f} seconds of the processor, so that a mutant that only a later one would notice counts as a survivor. Left
out are the tests that take longest: those of a trained model, of `torch.compile`, and of one quantised cache.
"""


def write(folder: Path, version: str, mutants: Sequence[Mutant], budget: float) -> Path:
    """Writes the page beside `results.jsonl`, where only what is of these mutants is kept, and `reasons.json`."""
    known = results.read(folder / "results.jsonl")
    results.keep(folder / "results.jsonl", known, [mutant.name for mutant in mutants])
    reasons = json.loads((folder / "reasons.json").read_text())
    counted = [mutant for mutant in mutants if not mutant.is_text]
    tried = [
        Tried(mutant, known[mutant.name], *reasons.get(mutant.name, ("not looked at", "")))
        for mutant in _sample(counted, known)
        if known[mutant.name].outcome != "invalid"
    ]
    lines = [
        f"# Mutants of freeze_core {version}",
        "",
        INTRODUCTION,
        _summary(tried, len(counted)),
        "",
        SCOPE.format(texts=len(mutants) - len(counted), budget=budget),
        *_by_module(tried),
        "",
        *_survivors(tried),
    ]
    path = folder / "README.md"
    path.write_text("\n".join(lines).rstrip() + "\n")
    return path


def _sample(mutants: Sequence[Mutant], known: Mapping[str, Result]) -> Iterable[Mutant]:
    """The mutants up to the first that was not tried.

    Others after it were tried when there was less code: with them, the sample would be mostly of what is older.
    """
    return takewhile(lambda mutant: mutant.name in known, mutants)


def interval(part: int, whole: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a fraction, in per cent."""
    z = 1.96
    centre = (part + z * z / 2) / (whole + z * z)
    half = z / (whole + z * z) * math.sqrt(part * (whole - part) / whole + z * z / 4)
    return 100 * (centre - half), 100 * (centre + half)


def _summary(tried: Sequence[Tried], possible: int) -> str:
    killed, whole = sum(each.result.is_killed for each in tried), len(tried)
    first = sum(each.result.first in results.KILLED for each in tried)
    low, high = interval(first, whole)
    kinds = Counter(each.kind for each in tried if not each.result.is_killed)
    survivors = ", ".join(f"{kinds[kind]} {kind}" for kind in WHY if kinds[kind])
    noticeable = whole - sum(kinds[kind] for kind in HARMLESS)
    return (
        f"**{killed} of {whole} mutants are killed: {100 * killed / whole:.1f} %.** Those that survive: {survivors}. "
        f"Of the {noticeable} that a test could notice, {100 * killed / noticeable:.1f} % are killed.\n\n"
        f"They are a random sample of all {possible}. When they were first tried, before tests were written for those "
        f"that survived, {100 * first / whole:.1f} % were killed; that, and its 95 % interval of {low:.1f} to "
        f"{high:.1f} %, is what to expect at least of the mutants that have not been tried."
    )


def _by_module(tried: Iterable[Tried]) -> list[str]:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for each in tried:
        counts[_short(each.mutant)][each.result.outcome] += 1
    return [
        "| module | mutants | killed | of these by time | survived | on a line that no test runs |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {module} | {count.total()} | {count['killed'] + count['timeout']} | {count['timeout']} | "
            f"{count['survived']} | {count['unreached']} |"
            for module, count in sorted(counts.items())
        ),
    ]


def _survivors(tried: Iterable[Tried]) -> list[str]:
    left = sorted(
        (each for each in tried if not each.result.is_killed), key=lambda each: (each.mutant.module, each.mutant.line)
    )
    lines = []
    for kind, meaning in WHY.items():
        rows = [_row(each.mutant, each.reason) for each in left if each.kind == kind]
        if rows:
            head = ["| where | change | reason |", "| --- | --- | --- |"]
            lines += [f"## {kind}: {meaning} ({len(rows)})", "", *head, *rows, ""]
    return lines


def _row(mutant: Mutant, reason: str) -> str:
    return f"| {_short(mutant)}:{mutant.line} `{mutant.function}` | {_change(mutant)} | {reason} |"


def _short(mutant: Mutant) -> str:
    return mutant.module.removeprefix("freeze_core.")


def _change(mutant: Mutant) -> str:
    """What became what, as a cell of a table: of long code the changed part, and what stands around it."""
    before, after = (" ".join(code.split()) for code in (mutant.before, mutant.after))
    first = _shared(before, after)
    last = min(_shared(before[::-1], after[::-1]), len(before) - first, len(after) - first)
    start, end = max(first - CONTEXT, 0), max(last - CONTEXT, 0)
    parts = [f"{'…' * bool(start)}{code[start : len(code) - end]}{'…' * bool(end)}" for code in (before, after)]
    return " → ".join(f"`{part}`" for part in parts).replace("|", "\\|")


def _shared(one: str, other: str) -> int:
    """How many characters at the beginning are the same."""
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
