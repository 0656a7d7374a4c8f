"""A vector is loaded as it was saved, and a file of something else is refused."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from discovered import METRIC, NEGATIVE, POSITIVE, discover
from torch import Tensor

from freeze_core import InterventionConfig, InterventionError, InterventionVector
from freeze_core.files import read_file, write_file
from pytest_circuitfreeze.models import tiny_model


def test_a_vector_is_what_it_was_when_it_is_loaded(tmp_path: Path) -> None:
    model = tiny_model("mistral_gqa")
    for number, made in enumerate(
        (discover(model), discover(model, POSITIVE, NEGATIVE, 1, "optimised", strengths=(1.0, 2.0)))
    ):
        path = tmp_path / str(number)
        made.save(path)
        loaded = InterventionVector.load(path)
        assert torch.equal(loaded.vector, made.vector)
        assert loaded.to_frame().equals(made.to_frame())
        assert (loaded.to_markdown(), loaded.to_latex()) == (made.to_markdown(), made.to_latex())
        for field in ("layer", "method", "found", "prompts", "origin", "paired", "threshold", "typical_norm"):
            assert getattr(loaded, field) == getattr(made, field)
        for field in ("cosines", "losses"):
            assert torch.equal(getattr(loaded, field), getattr(made, field))
        with loaded.apply(model):
            steered = model(POSITIVE).logits
        with made.apply(model):
            assert torch.equal(model(POSITIVE).logits, steered)
    assert {field.name for field in fields(made)} == {
        *("vector", "layer", "method", "found", "typical_norm", "held_out", "threshold", "paired", "cosines"),
        *("losses", "effects", "prompts", "origin", "resampling"),
    }
    InterventionConfig().save(tmp_path / "config")
    for name, message in (("nowhere", "cannot be read"), ("config", "must be 'circuitfreeze-intervention-vector-1'")):
        with pytest.raises(InterventionError, match=f"intervention vector of .*{message}"):
            InterventionVector.load(tmp_path / name)


BAD = [
    ("threshold", "NaN"),
    ("threshold", '"x"'),
    ("threshold", "true"),
    ("typical_norm", "Infinity"),
    ("origin", "[" * 200_000),
]
"""Facts of a vector that no discovery writes, as text."""


@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        ("vector", torch.ones(2, 2)),
        ("vector", torch.tensor([1.0, float("nan")])),
        ("vector", torch.tensor([1, 2])),
        ("cosines", torch.tensor([float("inf")], dtype=torch.float64)),
        ("positive", torch.ones(3)),
        ("effects.controls", torch.ones(1, 8, 4, dtype=torch.float64)),
        ("effects.clean", torch.ones(4, dtype=torch.float64)),
    ],
)
def test_a_file_that_holds_something_else_is_refused(tmp_path: Path, tensor: str, value: Tensor) -> None:
    discover(tiny_model("gpt2"), **METRIC).save(tmp_path / "vector")
    tensors, facts = read_file(tmp_path / "vector", InterventionVector.file_format, "intervention vector")
    del facts["format"]
    write_file(tmp_path / "vector", InterventionVector.file_format, {**tensors, tensor: value}, facts)
    with pytest.raises(InterventionError, match="not what save writes"):
        InterventionVector.load(tmp_path / "vector")
    for fact, text in (("layer", '"one"'), ("origin", "{}"), ("effects", "3"), ("found", "null"), *BAD):
        write_file(tmp_path / "vector", InterventionVector.file_format, tensors, {**facts, fact: text})
        with pytest.raises(InterventionError, match="not what save writes"):
            InterventionVector.load(tmp_path / "vector")
