"""Vectors that cannot be added as asked, or not to that model, are refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from steered import IDS, state, vector_of

from freeze_core import InterventionError, UnsupportedModelError, score_heads
from freeze_core.vectors.sites import find_residual
from pytest_circuitfreeze.models import tiny_model


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strength": float("nan")}, r"strength=nan: must be a finite number"),
        ({"strength": float("inf")}, r"strength=inf: must be"),
        ({"strength": True}, r"strength=True: must be"),
        ({"strength": "1"}, r"strength='1': must be"),
        ({"strength": 1e39}, r"strength=1e\+39: the vector times that is not finite in torch.float32"),
        ({"positions": "first"}, r"positions='first': must be 'all', 'last', a list"),
        ({"positions": []}, r"positions=\[\]: must be"),
        ({"positions": [1, 1]}, r"positions=\[1, 1\]: must be"),
        ({"positions": [True]}, r"positions=\[True\]: must be"),
        ({"positions": [0.5]}, r"positions=\[0.5\]: must be"),
        ({"positions": 3}, r"positions=3: must be"),
        ({"positions": range(0)}, r"positions=range\(0, 0\): must be"),
        ({"positions": range(-1, 3)}, r"positions=range\(-1, 3\): must be"),
        ({"on_stale_cache": "shout"}, r"on_stale_cache='shout': must be"),
    ],
)
def test_what_cannot_be_served_is_an_error_and_installs_nothing(given: dict[str, Any], message: str) -> None:
    model = tiny_model("gpt2")
    vector, before = vector_of(model), state(model)
    with pytest.raises(InterventionError, match=message):
        vector.apply(model, **given)
    assert state(model) == before


def test_another_model_is_refused() -> None:
    vector = vector_of(tiny_model("llama"), 2)
    for other, message in (
        (tiny_model("llama", seed=1), r"vector is of another model \(LlamaForCausalLM"),
        (tiny_model("gpt2"), r"vector is of another model"),
        (tiny_model("llama_70b"), r"the vector has 32 features|of another model"),
    ):
        with pytest.raises(InterventionError, match=message):
            vector.apply(other)
    wide = replace(vector, vector=torch.ones(48))
    with pytest.raises(InterventionError, match=r"vector has 48 features, and the stream of LlamaForCausalLM 32"):
        wide.apply(tiny_model("llama"))
    with pytest.raises(InterventionError, match=r"layer=5: must be an int in -3 to 2, of 3 layers"):
        replace(vector, layer=5).apply(tiny_model("llama"))
    with pytest.raises(UnsupportedModelError, match="model is a str: must be"):
        vector.apply("llama")


def test_layers_without_one_residual_stream_are_refused() -> None:
    for name in ("hrm_text", "xlm"):  # layers that run again and again; a list of attentions, and others beside it
        with pytest.raises(UnsupportedModelError, match="no one list of whole layers"):
            find_residual(tiny_model(name), 0)
    with pytest.raises(InterventionError, match=r"gives \[4, 2, 7, \d+\] where \[batch, token, hidden\]"):
        vector_of(tiny_model("gemma3n_text"))


def test_a_steered_model_is_not_scored_as_if_it_were_plain() -> None:
    model = tiny_model("gpt2")
    vector = vector_of(model)
    with vector.apply(model):
        with pytest.raises(InterventionError, match="model is frozen"):
            score_heads(model, IDS, "loss", progress=False)
        with pytest.raises(InterventionError, match="model is frozen"):
            vector_of(model)
        with pytest.raises(InterventionError, match="model is frozen"):
            vector.evaluate(model, IDS, "loss", metric_positions="all", progress=False)


def test_a_layer_is_steered_through_one_model_at_a_time() -> None:
    model, other = tiny_model("llama"), tiny_model("llama")
    vector = vector_of(model)
    other.model.layers = model.model.layers
    with vector.apply(model), pytest.raises(InterventionError, match="frozen already, through another LlamaModel"):
        vector.apply(other)
