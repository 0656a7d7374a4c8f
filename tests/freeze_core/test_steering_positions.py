"""The columns that a vector is added at, under padding too, and those that are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from steered import DEFAULT, LEFT, RIGHT, by_hand, logits, vector_of
from torch import Tensor

from freeze_core import InterventionError
from freeze_core.identity import model_identity
from freeze_core.vectors.sites import find_residual
from pytest_circuitfreeze.models import tiny_model
from pytest_circuitfreeze.shrinking import tiny_of_type


@pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
@pytest.mark.parametrize("architecture", DEFAULT)
def test_the_last_real_token_is_found_under_padding(architecture: str, mask: Tensor) -> None:
    model = tiny_model(architecture)
    vector = vector_of(model)

    def add(x: Tensor) -> Tensor:
        x = x.clone()
        for row in range(len(x)):
            last = max(column for column in range(7) if mask[row, column])
            x[row, last] = x[row, last] + vector.vector
        return x

    expected = by_hand(model, 1, add, attention_mask=mask)
    for entered in (model, model.base_model):
        with vector.apply(entered, positions="last"):
            assert torch.equal(logits(model, attention_mask=mask), expected)


@pytest.mark.parametrize("positions", [[1, 5], [-1, 0], range(2, 5), range(5, 100), range(0, 7, 2)], ids=str)
def test_columns_are_those_of_a_hook_by_hand(positions: Any) -> None:
    model = tiny_model("gpt2")
    vector = vector_of(model)
    columns = [column % 7 for column in positions if column < 7]

    def add(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, columns] = x[:, columns] + vector.vector
        return x

    with vector.apply(model, positions=positions):
        steered = logits(model)
    assert torch.equal(steered, by_hand(model, 1, add))


def test_other_positions_of_the_layer_stay_bit_for_bit() -> None:
    model = tiny_model("llama_gqa")
    vector, seen = vector_of(model), []
    hook = model.model.layers[1].register_forward_hook(lambda module, args, output: seen.append(output))
    clean = logits(model)
    with vector.apply(model, positions=[3]):
        steered = logits(model)
    hook.remove()
    others = [column for column in range(7) if column != 3]
    assert torch.equal(seen[0][:, others], seen[1][:, others])
    assert torch.equal(clean[:, :3], steered[:, :3])


def test_a_column_that_is_padding_or_not_there_is_an_error() -> None:
    model = tiny_model("llama")
    vector = vector_of(model)
    with vector.apply(model, positions=[1]):
        with pytest.raises(InterventionError, match=r"positions=\[1\]: one of them is padding in some row"):
            logits(model, attention_mask=LEFT)
        logits(model, attention_mask=RIGHT)
    with vector.apply(model, positions=[-1]):
        logits(model, attention_mask=LEFT)
        with pytest.raises(InterventionError, match=r"padding in some row"):
            logits(model, attention_mask=RIGHT)
    for beyond in ([7], [-8]):
        with (
            vector.apply(model, positions=beyond),
            pytest.raises(InterventionError, match="out of range; the pass ends"),
        ):
            logits(model)
    with vector.apply(model, positions=[0, -7]), pytest.raises(InterventionError, match="same of 7 columns twice"):
        logits(model)


def test_tokens_that_a_model_puts_before_others_are_no_columns() -> None:
    model = tiny_of_type("cpmant", attn="eager", fields={"prompt_length": 3})
    with pytest.raises(InterventionError, match=r"gives \[2, 10, 32\] for \[2, 7\] \[prompt, token\]"):
        vector_of(model)
    made, site = vector_of(tiny_model("llama")), find_residual(model, 1)
    vector = replace(made, origin={**made.origin, "identity": model_identity(site.sites)})
    for positions in ([0], range(3)):
        with pytest.raises(InterventionError, match="CpmAntModel puts tokens of its own before"):
            vector.apply(model, positions=positions)

    def last(x: Tensor) -> Tensor:
        return torch.cat([x[:, :-1], x[:, -1:] + vector.vector], dim=1)

    for positions, add in (("all", lambda x: x + vector.vector), ("last", last)):
        with vector.apply(model, positions=positions):
            steered = logits(model)
        assert torch.equal(steered, by_hand(model, 1, add))
