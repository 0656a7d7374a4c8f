"""Scores of heads are loaded as they were saved, and a file of something else is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from freeze_core import HeadScores, InterventionError, score_heads
from freeze_core.files import read_file, write_file
from pytest_circuitfreeze.models import tiny_model

IDS = torch.arange(14).view(2, 7) * 5 % 97


def equal(one: HeadScores, other: HeadScores) -> bool:
    """Whether two results are the same in every bit."""
    tensors = [(one.scores, other.scores), (one.exact, other.exact)]
    return all(
        left.keys() == right.keys()
        and all(torch.equal(left[name].nan_to_num(-1e9), right[name].nan_to_num(-1e9)) for name in left)
        for left, right in tensors
    ) and all(
        getattr(one, name) == getattr(other, name)
        for name in ("clean", "metric", "method", "rows", "rest", "confidence")
    )


@pytest.mark.parametrize("method", ["exact", "attribution", "screened"])
def test_scores_are_loaded_as_they_were_saved(method: str, tmp_path: Path) -> None:
    made = score_heads(tiny_model("mistral_gqa"), IDS, "loss", method, layers=[0, 2], progress=False)
    made.save(tmp_path / "scores")
    loaded = HeadScores.load(tmp_path / "scores")
    assert equal(loaded, made)
    assert bool(loaded.scores["qk"][1].isnan().all())  # a layer that was not scored
    assert loaded.to_frame().equals(made.to_frame())


def test_scores_that_are_infinite_or_without_exact_are_loaded(tmp_path: Path) -> None:
    scores = {"z": torch.tensor([[torch.inf, torch.nan]], dtype=torch.float64)}
    made = HeadScores(scores, -torch.inf, "mine", "exact", 3)
    made.save(tmp_path / "scores")
    assert equal(HeadScores.load(tmp_path / "scores"), made)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores.qk": torch.zeros(2, 4)}, r"qk must be numbers \[2, 4\] in float64"),
        ({"scores.ov": torch.zeros(3, 4, dtype=torch.float64)}, r"ov must be numbers \[2, 4\]"),
        ({"scores.ov": None}, "scores.ov"),
        ({"exact.qk": torch.zeros(2, 4)}, "exact must say of each score"),
        ({"exact.k": torch.zeros(2, 4).bool()}, "exact must say of each score"),
        ({"clean": '"low"'}, "clean and rows must be"),
        ({"rows": "true"}, "clean and rows must be"),
        ({"metric": "3"}, "metric=3: must be a name"),
        ({"method": "null"}, "method=None: must be a name"),
        ({"rest": '{"qk": "much"}'}, "rest must be a number for each circuit"),
        ({"confidence": '{"k": 0.5}'}, "confidence must be a number for each circuit"),
        ({"circuits": "[" * 200_000}, "nested too deeply"),
        ({"circuits": "[]"}, ""),
    ],
)
def test_a_file_of_something_else_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "scores"
    scores = {name: torch.zeros(2, 4, dtype=torch.float64) for name in ("qk", "ov")}
    exact = {name: torch.ones(2, 4).bool() for name in scores}
    HeadScores(scores, 1.5, "loss", "screened", 2, exact, {"qk": 0.5, "ov": 0.0}, {"qk": 0.9, "ov": 0.8}).save(path)
    tensors, facts = read_file(path, HeadScores.file_format, "head scores")
    facts.pop("format")
    for name, value in change.items():
        part: dict[str, Any] = facts if isinstance(value, str) else tensors
        part.pop(name, None)
        part |= {} if value is None else {name: value}
    write_file(path, HeadScores.file_format, tensors, facts)
    with pytest.raises(InterventionError, match=f"not what save writes .*{message}"):
        HeadScores.load(path)
