"""Claims by models: the table that the terminal and the reports show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pytest_circuitfreeze.collect import ROOT
from pytest_circuitfreeze.results import WITHOUT_MODEL, Result, used

# What a cell says, worst first: a cell of several tests says the worst of them.
WORDS = {
    "failed": "FAIL",
    "error": "ERROR",
    "accepted": "accepted",
    "skipped": "skip",
    "refused": "refused",
    "passed": "pass",
    "not offered": "not offered",
    "n/a": "n/a",
}
PARTLY = "pass*"
"""Passed, but for configs that the engine refuses by name."""
IN_PART = "in part"
"""Passed as far as the engine claims to go: other configs it does not offer."""
NOT_RUN = "-"


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
    seen = dict.fromkeys(result.model for result in results)
    named = tuple(model for model in order if model in seen)
    named += tuple(model for model in seen if model is not None and model not in order)
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
    counts = ", ".join(_counted(results, outcome) for outcome in WORDS if _of(results, outcome))
    examples = sum(result.examples for result in results)
    line = f"{_count(claims, 'claim')} on {_count(models, 'model')}: {counts}; {_count(examples, 'example')}"
    passed = _of(results, "passed")
    tightest = max(passed, key=lambda result: used(result.error, result.bound), default=None)
    if tightest is None or tightest.error == 0.0:
        return line
    share = f"{used(tightest.error, tightest.bound):.0%}"
    return f"{line}\nclosest to its bound: {words(tightest.claim)}, {tightest.model or WITHOUT_MODEL}, {share} of it"


def _of(results: Iterable[Result], outcome: str) -> list[Result]:
    return [result for result in results if result.outcome == outcome]


def _counted(results: Iterable[Result], outcome: str) -> str:
    own = _of(results, outcome)
    partly = sum(bool(result.not_offered) for result in own) if outcome == "passed" else 0
    return f"{len(own)} {outcome}" + (f" ({partly} {IN_PART})" if partly else "")


def reasons(results: Iterable[Result]) -> list[str]:
    """A line for each reason why a failure is accepted, or a claim refused, not offered, or not about a model.

    What is not offered on several models for one reason is one line.
    """
    found: dict[tuple[str, str, str], set[str]] = {}
    missing: dict[str, dict[str, set[str]]] = {}
    for result in results:
        model = result.model or WITHOUT_MODEL
        told = [(result.outcome, result.message)] if result.outcome in ("accepted", "refused", "n/a") else []
        told += [(PARTLY, reason) for reason in result.refusals]
        for word, reason in told:
            found.setdefault((model, word, reason), set()).add(result.claim)
        for reason in result.not_offered:
            missing.setdefault(reason, {}).setdefault(model, set()).add(result.claim)
    claims = len({result.claim for result in results})
    lines = [
        f"{model} {word}{'' if len(about) == claims or word == PARTLY else f' ({words(min(about))})'}: {reason}"
        for (model, word, reason), about in found.items()
    ]
    for reason, about_models in missing.items():
        named = set.union(*about_models.values())
        about = f" ({words(min(named))})" if len(named) == 1 < claims else ""
        lines.append(f"{', '.join(about_models)} not offered{about}: {reason}")
    return lines


def words(claim: str) -> str:
    """A claim as a person reads it: ``qk_leaves_v`` is ``qk leaves v``."""
    return claim.replace("_", " ")


def subject(file: str) -> str:
    """What a file is about: a shipped ``circuitfreeze/test_gradients.py`` is ``gradients``, any other its own path."""
    folder, _, name = file.rpartition("/")
    if folder != ROOT or not name.endswith(".py"):
        return file.removeprefix(f"{ROOT}/")
    return words(name.removesuffix(".py").partition("_")[2])


def cell(results: Iterable[Result], model: str) -> str:
    """What the table says of some results on one model: the worst of them; no pass where a part is not offered."""
    own = [result for result in results if (result.model or WITHOUT_MODEL) == model]
    outcomes = {result.outcome for result in own}
    word = next((word for outcome, word in WORDS.items() if outcome in outcomes), NOT_RUN)
    if word == WORDS["passed"] and any(result.not_offered for result in own):
        return IN_PART
    return PARTLY if word == WORDS["passed"] and any(result.refusals for result in own) else word


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
