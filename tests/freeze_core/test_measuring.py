"""The loop of every measurement: what its passes draw, what it refuses, and that it leaves the generators alone."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from freeze_core import InterventionError
from freeze_core.runs.measuring import measure
from freeze_core.scoring.batches import Batch, batches_of


class Noise(nn.Module):
    """Logits that are drawn, so that equal values are equal draws."""

    config = None

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.weight + torch.rand(*input_ids.shape, 5)


def first_logits(number: int, batch: Batch, logits: Tensor, clean: Tensor, run: str) -> dict[str, Tensor]:
    return {"first": logits[:, 0, 0].double(), "clean": clean[:, 0, 0].double()}


def measured(model: nn.Module, measurement: Any = first_logits, **interventions: Any) -> dict[str, dict[str, Tensor]]:
    batches = batches_of(model, [torch.ones(2, 3, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)], "all")
    return measure(model, batches, "unfrozen", interventions, measurement, task="test", progress=False)


def test_all_passes_over_a_batch_draw_alike_and_the_next_batch_draws_on() -> None:
    torch.manual_seed(0)
    found = measured(Noise(), frozen=lambda number: nullcontext())
    torch.manual_seed(0)
    expected = torch.cat([torch.rand(2, 3, 5)[:, 0, 0], torch.rand(1, 4, 5)[:, 0, 0]]).double()
    for run in ("unfrozen", "frozen"):
        assert torch.equal(found[run]["first"], expected)
        assert torch.equal(found[run]["clean"], expected)


def test_an_intervention_that_runs_the_model_first_draws_what_the_pass_draws() -> None:
    model, drawn = Noise(), []

    @contextmanager
    def recorded(number: int) -> Any:
        drawn.append(float(model(torch.ones(2 - number, 3 + number))[0, 0, 0]))
        yield

    found = measured(model, recorded=recorded)
    assert torch.equal(found["recorded"]["first"], found["unfrozen"]["first"])
    assert found["unfrozen"]["first"][[0, 2]].tolist() == drawn


def test_each_intervention_is_in_effect_in_its_own_passes_only() -> None:
    model = Noise()

    @contextmanager
    def raised(number: int) -> Any:
        with torch.no_grad():
            model.weight += 10 + number
            yield
            model.weight.zero_()

    found = measured(model, raised=raised, last=lambda number: nullcontext())
    change = found["raised"]["first"] - found["unfrozen"]["first"]
    torch.testing.assert_close(change, torch.tensor([10.0, 10, 11], dtype=torch.float64), rtol=0, atol=1e-5)
    assert torch.equal(found["last"]["first"], found["unfrozen"]["first"])


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_values_that_are_not_finite_are_refused_with_their_row_batch_and_run(value: float) -> None:
    def unbounded(number: int, batch: Batch, logits: Tensor, clean: Tensor, run: str) -> dict[str, Tensor]:
        rows = torch.zeros(batch.rows, dtype=torch.float64)
        return {"loss": rows.fill_(value) if (number, run) == (1, "frozen") else rows}

    state = torch.get_rng_state()
    with pytest.raises(InterventionError, match=f"metric=loss is {value} for row 0 of batch 1, frozen: its mean"):
        measured(Noise(), unbounded, frozen=lambda number: nullcontext())
    assert torch.equal(torch.get_rng_state(), state)


def test_logits_of_some_tokens_only_are_refused() -> None:
    class Last(Noise):
        def forward(self, input_ids: Tensor) -> Tensor:
            return super().forward(input_ids)[:, -1:]

    with pytest.raises(InterventionError, match=r"Last gave logits \[2, 1, 5\] for \[2, 3\] .*every token"):
        measured(Last())


def test_a_measurement_that_raises_leaves_the_generators_as_they_were() -> None:
    def failing(*measured: Any) -> dict[str, Tensor]:
        raise LookupError

    state = torch.get_rng_state()
    with pytest.raises(LookupError):
        measured(Noise(), failing)
    assert torch.equal(torch.get_rng_state(), state)
