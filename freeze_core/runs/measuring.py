"""The loop of every measurement: each batch as the model is, then under each intervention, with the same draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from freeze_core.errors import InterventionError
from freeze_core.generators import Generators
from freeze_core.inputs import logits_of, run
from freeze_core.scoring.batches import Batch, copied
from freeze_core.scoring.metrics import Metric

__all__ = ["logits_at", "measure", "refuse_equal", "refuse_infinite", "rows_of"]

Intervention = Callable[[int], AbstractContextManager[object]]
"""Given the number of a batch, what is in effect during a pass over it."""

Measurement = Callable[[int, Batch, Tensor, Tensor, str], Mapping[str, Tensor]]
"""Of a batch's number, the batch, the logits of a pass, those of the clean one, and the run: values `[row]` by name."""


def measure(
    model: nn.Module,
    batches: Sequence[Batch],
    clean: str,
    interventions: Mapping[str, Intervention],
    measurement: Measurement,
    *,
    task: str,
    progress: bool,
) -> dict[str, dict[str, Tensor]]:
    """The measured values of all batches, `[row]` by name, for the clean run and for each intervention.

    All passes over a batch draw the same dropout, the next batch draws on from where the clean pass ended, and torch's
    generators are put back afterwards.

    Args:
        clean: what the run without an intervention is called.
        interventions: the other runs, by name. One may run the model itself while it is entered, to record it; it
            then draws what the pass draws.
        task: what the bar says.

    Raises:
        InterventionError: the model cannot run on a batch, or a value is not finite.
    """
    found: dict[str, list[Mapping[str, Tensor]]] = {name: [] for name in (clean, *interventions)}
    generators = Generators(model)
    bar = tqdm(total=len(batches) * len(found), desc=task, unit="pass", disable=not progress)

    def keep(name: str, logits: Tensor) -> None:
        values = measurement(number, batch, logits, clean_logits, name)
        for quantity, rows in values.items():
            refuse_infinite(rows, quantity, number, name)
        found[name].append(values)
        bar.update()

    with torch.no_grad(), generators.restored(), bar:
        for number, batch in enumerate(batches):
            start = generators.states()
            clean_logits = logits_at(model, batch)
            after = generators.states()
            keep(clean, clean_logits)
            for name, intervention in interventions.items():
                generators.put(start)
                with intervention(number):
                    generators.put(start)
                    logits = logits_at(model, batch)
                keep(name, logits)
                del logits  # before the next pass makes others
            generators.put(after)
    return {
        name: {quantity: torch.cat([values[quantity] for values in of_batches]) for quantity in of_batches[0]}
        for name, of_batches in found.items()
    }


def rows_of(metric: Metric) -> Measurement:
    """Measures a metric of each row, under its own name."""
    return lambda *measured: {metric.name: metric.rows(*measured)}


def logits_at(model: nn.Module, batch: Batch) -> Tensor:
    """The logits at a batch's positions `[row, position, word]`.

    Raises:
        InterventionError: the model cannot run on the batch, or gives logits of other tokens.
    """
    logits = logits_of(run(model, copied(batch.arguments)))
    if logits.dim() != 3 or logits.shape[:2] != (batch.rows, batch.columns):
        raise InterventionError(
            f"{type(model).__name__} gave logits {list(logits.shape)} for {[batch.rows, batch.columns]} [batch, "
            "token]: they must be of every token (no logits_to_keep=)"
        )
    return batch.at_positions(logits)


def refuse_infinite(rows: Tensor, metric: str, number: int, where: str) -> None:
    """Raises `InterventionError` for values `[row]` of batch `number` that have no mean."""
    if not bool(rows.isfinite().all()):
        row = int((~rows.isfinite()).nonzero()[0])
        raise InterventionError(
            f"metric={metric} is {float(rows[row])} for row {row} of batch {number}, {where}: its mean is not a "
            "number; measure something that is finite, leave the row out, or run the model in a wider dtype"
        )


def refuse_equal(metric: str, rows: Tensor, others: Tensor, where: str) -> None:
    """Raises `InterventionError` where a metric `[prompt]` has the same mean in two runs, which `where` names."""
    if float((rows - others).mean()) == 0:
        raise InterventionError(
            f"metric={metric} is {float(rows.mean()):.6g} {where}, the same in the mean: there is no gap between them "
            "that could be restored or broken; give prompts, targets or a metric that tell them apart"
        )
