"""A study whose metric raises amid its passes, and the model that it leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from freeze_core.freezing.install import is_frozen

IDS = torch.arange(12).view(2, 6)


class Stopped(Exception):
    pass


def stopped_at(call: int, model: Any, study: Callable[[Callable[[Tensor], Tensor]], Any]) -> None:
    """Fails where `model` is not what it was after `study`, given a metric, was stopped at that call of it."""
    with torch.no_grad():
        before = model(IDS).logits
    calls = []

    def stops(logits: Tensor) -> Tensor:
        calls.append(logits)
        if len(calls) == call:
            raise Stopped
        return logits[:, -1, 5]

    state = torch.get_rng_state()
    with pytest.raises(Stopped):
        study(stops)
    assert not is_frozen(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, before)
