"""Claims by models: the table that the terminal and the reports show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pytest_circuitfreeze.results import Result, used

# What a cell says, worst first: a cell of several tests says the worst of them.
WORDS = {"failed": "FAIL", "error": "ERROR", "skipped": "skip", "refused": "refused", "passed": "pass", "n/a": "n/a"}
PARTLY = "pass*"
"""Passed, but for configs that the engine refuses by name."""
NOT_RUN = "-"
WITHOUT_MODEL = "(none)"


@dataclass(frozen=True)
class Row:
    """One claim: how it fared on each model, and how much of its bound the largest error used."""

    file: str
    claim: str
    sentence: str
    cells: tuple[str, ...]
    closest: str


def columns(results: Iterable[Result], order: Sequence[str]) -> tuple[str, ...]:
    """The models that were run, in the order asked for; then :data:`WITHOUT_MODEL` if a test was about none."""
    seen = {result.model for result in results}
    named = tuple(model for model in order if model in seen)
    return named + ((WITHOUT_MODEL,) if None in seen else ())


def rows(results: Sequence[Result], models: Sequence[str]) -> list[Row]:
    """One row a claim, in the order of the results."""
    by_claim: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        by_claim.setdefault((result.file, result.claim), []).append(result)
    return [
        Row(file, claim, found[0].sentence, tuple(cell(found, model) for model in models), closest(found))
        for (file, claim), found in by_claim.items()
    ]


def closest(results: Iterable[Result]) -> str:
    """The largest share of a bound that a passing test used; ``exact`` where all were bit for bit."""
    measured = [result for result in results if result.outcome == "passed" and result.examples]
    if not measured:
        return NOT_RUN
    if all(result.bound == 0.0 for result in measured):
        return "exact"
    share = max(used(result.error, result.bound) for result in measured)
    return "<1%" if 0 < share < 0.01 else f"{share:.0%}"


def totals(results: Sequence[Result]) -> str:
    """How many claims on how many models came out how, and the one that came closest to its bound."""
    claims = len({(result.file, result.claim) for result in results})
    models = len({result.model for result in results if result.model})
    counts = ", ".join(
        f"{number} {outcome}" for outcome in WORDS if (number := sum(result.outcome == outcome for result in results))
    )
    examples = sum(result.examples for result in results)
    line = f"{_count(claims, 'claim')} on {_count(models, 'model')}: {counts}; {_count(examples, 'example')}"
    passed = [result for result in results if result.outcome == "passed"]
    tightest = max(passed, key=lambda result: used(result.error, result.bound), default=None)
    if tightest is None or tightest.error == 0.0:
        return line
    share = f"{used(tightest.error, tightest.bound):.0%}"
    return f"{line}\nclosest to its bound: {words(tightest.claim)}, {tightest.model}, {share} of it"


def reasons(results: Iterable[Result]) -> list[str]:
    """A line for each reason for which a claim was refused, refused in part, or is not about a model."""
    found: dict[tuple[str, str, str], set[str]] = {}
    for result in results:
        told = [("refused", result.message)] if result.outcome == "refused" else []
        told += [("n/a", result.message)] if result.outcome == "n/a" else []
        told += [(PARTLY, reason) for reason in result.refusals]
        for word, reason in told:
            found.setdefault((result.model or WITHOUT_MODEL, word, reason), set()).add(result.claim)
    claims = len({result.claim for result in results})
    return [
        f"{model} {word}{'' if len(about) == claims or word == PARTLY else f' ({words(min(about))})'}: {reason}"
        for (model, word, reason), about in found.items()
    ]


def words(claim: str) -> str:
    """A claim as a person reads it: ``qk_leaves_v`` is ``qk leaves v``."""
    return claim.replace("_", " ")


def subject(file: str) -> str:
    """What a suite file is about: ``test_gradients.py`` is ``gradients``."""
    return words(file.removesuffix(".py").partition("_")[2])


def cell(results: Iterable[Result], model: str) -> str:
    """What the table says of some results on one model: the worst of them."""
    own = [result for result in results if (result.model or WITHOUT_MODEL) == model]
    outcomes = {result.outcome for result in own}
    word = next((word for outcome, word in WORDS.items() if outcome in outcomes), NOT_RUN)
    return PARTLY if word == WORDS["passed"] and any(result.refusals for result in own) else word


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
