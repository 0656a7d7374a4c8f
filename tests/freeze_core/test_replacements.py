"""Freeze types as classes: one for each, and another one is a class alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from freeze_core import AttentionCircuitFreezer, FreezeType, InterventionConfig
from freeze_core.freezing import requests
from freeze_core.freezing.replacements import REPLACEMENTS, Replacement
from pytest_circuitfreeze.models import tiny_model


def test_each_freeze_type_has_one_class():
    assert list(REPLACEMENTS) == list(FreezeType)


@dataclass(frozen=True)
class Median(Replacement):
    freeze_type = FreezeType.MEAN  # stands in for it here

    def in_module(self, features):
        return lambda x, running: x.flatten(0, 1).median(0).values


def test_a_new_freeze_type_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "REPLACEMENTS", {**REPLACEMENTS, FreezeType.MEAN: Median})
    model = tiny_model("llama")
    freezer, ids = AttentionCircuitFreezer(), torch.arange(1, 13).view(2, 6)
    clean = freezer.record(model, ids)[0].v
    with freezer.freeze_circuits(model, InterventionConfig([0], [0], "ov", "mean")):
        frozen = freezer.record(model, ids)[0].v
    median = clean.flatten(0, 1).median(0).values
    assert torch.equal(frozen[:, :, 0], median[0].expand_as(frozen[:, :, 0]))
    assert torch.equal(frozen[:, :, 1:], clean[:, :, 1:])
