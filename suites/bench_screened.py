"""What a screened sweep of a trained model takes of the exact one's time, and which of the largest scores it misses."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from time import process_time
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from torch import Tensor

from freeze_core import score_heads
from pytest_circuitfreeze.loading import ModelLoadError, load_model, smollm2_gguf
from pytest_circuitfreeze.suites.bench_sweeps import timed
from pytest_circuitfreeze.suites.paired import spread
from pytest_circuitfreeze.threads import one_thread

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

ROUNDS = 3
TOP = 10
SHARE = 0.2


class Question(NamedTuple):
    """A text, and what is asked of it; the targets are words."""

    text: str
    metric: str
    positions: str = "all"
    targets: tuple[str, ...] = ()


QUESTIONS: Mapping[str, Question] = {
    "a sentence": Question(
        "When Mary and John went to the store, John gave a drink to", "logit_difference", "last", (" Mary", " John")
    ),
    "a paragraph": Question(
        "The capital of France is Paris, which lies on the river Seine. It has been the seat of kings and presidents "
        "for centuries, and more than two million people live there today. The capital of Germany is Berlin, which "
        "lies on the river Spree. It was divided by a wall for twenty-eight years, and more than three million people "
        "live there today. Both cities have museums, parks, universities and a great number of cafes.",
        "loss",
    ),
}

questions = pytest.mark.parametrize("question", QUESTIONS)


class Swept(NamedTuple):
    """What both sweeps of one question gave."""

    tokens: int
    shares: list[float]
    """CPU time of the screened one, of the exact one's just before it; one a round."""
    missed: dict[str, int]
    """By circuit, how many of the exact sweep's `TOP` largest scores are not among the screened one's."""


@questions
@pytest.mark.benchmark(group="screened sweep of a trained model: time", timer=process_time)
def bench_screened_time(benchmark: BenchmarkFixture, question: str) -> None:
    """CPU time of a screened sweep of QK and OV of all heads, as a share of the exact sweep's."""
    found = swept(question)
    ratios = {"screened": spread(found.shares)}
    _put(benchmark, found, question, engine="screened", ratios=ratios, target=SHARE)


@questions
@pytest.mark.benchmark(group="screened sweep of a trained model: missed of the ten largest", timer=process_time)
def bench_screened_misses(benchmark: BenchmarkFixture, question: str) -> None:
    """How many of the ten largest scores of the exact sweep a screened one does not find."""
    found = swept(question)
    counts = {"of either": sum(found.missed.values()), **found.missed}
    ratios = {name: {"median": count, "low": count, "high": count, "n": 1} for name, count in counts.items()}
    _put(benchmark, found, question, engine="of either", ratios=ratios, target=0)


def _put(benchmark: BenchmarkFixture, found: Swept, question: str, **extra: Any) -> None:
    benchmark.pedantic(lambda: None)
    benchmark.extra_info.update(row=f"{question}, {found.tokens} tokens", missing={}, **extra)


@cache
def swept(name: str) -> Swept:
    """Both sweeps, in turn, over one question."""
    model, tokenizer = _trained()
    question = QUESTIONS[name]
    ids: Tensor = tokenizer(question.text, return_tensors="pt").input_ids
    targets = tuple(tokenizer(word).input_ids[0] for word in question.targets) or None
    scores = {}

    def sweep(method: str) -> None:
        scores[method] = score_heads(
            model, ids, question.metric, method, positions=question.positions, targets=targets, progress=False
        ).scores

    with one_thread():
        times = [[timed(partial(sweep, method)) for method in ("exact", "screened")] for _ in range(ROUNDS)]
    missed = {
        circuit: len(_largest(exact) - _largest(scores["screened"][circuit]))
        for circuit, exact in scores["exact"].items()
    }
    return Swept(ids.shape[1], [screened / exact for exact, screened in times], missed)


def _largest(scores: Tensor) -> set[int]:
    return set(scores.abs().flatten().topk(TOP).indices.tolist())


@cache
def _trained() -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    try:
        weights = smollm2_gguf()
        model = load_model("smollm2")
    except ModelLoadError as error:
        pytest.skip(f"there is no trained model: {error}")
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name, local_files_only=True)
    return model, tokenizer
