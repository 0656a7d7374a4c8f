"""How a model is called, and which of what it returns is taken for its answer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from freeze_core import CircuitFreezeError, FreezeNotInForceError, InterventionError
from freeze_core.inputs import logits_of, model_arguments, run
from pytest_circuitfreeze.models import tiny_model

ANSWER, OTHER = torch.ones(1, 2, 3), torch.zeros(1, 2, 3)


@pytest.mark.parametrize(
    "output",
    [
        SimpleNamespace(logits=ANSWER, last_hidden_state=OTHER),
        SimpleNamespace(logits=None, last_hidden_state=ANSWER),
        (ANSWER, OTHER),
        [ANSWER, OTHER],
        ANSWER,
    ],
    ids=["logits", "hidden state", "tuple", "list", "tensor"],
)
def test_the_answer_of_a_model_is_found(output):
    assert logits_of(output) is ANSWER


@pytest.mark.parametrize("output", [(), [], ("text", ANSWER), {"logits": ANSWER}, None])
def test_what_has_no_answer_is_refused(output):
    with pytest.raises(InterventionError, match=f"the model returned a {type(output).__name__} without logits"):
        logits_of(output)


def test_a_model_is_called_by_the_names_of_its_arguments():
    model, bare = tiny_model("llama"), nn.Linear(2, 2)
    for dtype in (torch.int32, torch.int64):
        ids = torch.ones(1, 2, dtype=dtype)
        assert model_arguments(model, ids) == {"input_ids": ids, "use_cache": False}
        assert model_arguments(bare, ids) == {"input_ids": ids}
    assert model_arguments(model, ANSWER) == {"inputs_embeds": ANSWER, "use_cache": False}
    given = {"input_ids": ANSWER}
    assert model_arguments(model, given) == given
    assert model_arguments(model, given) is not given


@pytest.mark.parametrize(
    "bad", [{}, {1: ANSWER}, "text", torch.ones(0, 2).long(), torch.ones(1, 2), torch.ones(1, 2, 3).long()]
)
def test_what_a_model_cannot_be_given_is_refused(bad):
    with pytest.raises(InterventionError, match=r"^inputs"):
        model_arguments(tiny_model("llama"), bad)


@pytest.mark.parametrize("error", [TypeError, ValueError, IndexError, RuntimeError, AttributeError])
def test_what_a_model_raises_over_its_arguments_is_told_with_them(error):
    class Raises(nn.Module):
        def forward(self, **kwargs):
            raise error("its own reason")

    with pytest.raises(InterventionError, match=r"Raises cannot run on .*'x': \[1, 2, 3\], 'y': 5.*: its own reason"):
        run(Raises(), {"x": ANSWER, "y": 5})


@pytest.mark.parametrize("error", [FreezeNotInForceError, CircuitFreezeError, torch.OutOfMemoryError, KeyError])
def test_what_is_not_of_the_arguments_is_raised_as_it_is(error):
    class Raises(nn.Module):
        def forward(self):
            raise error("its own reason")

    with pytest.raises(error) as raised:
        run(Raises(), {})
    assert raised.type is error
