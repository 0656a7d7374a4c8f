"""First-order scores: what each freeze does to the z of its layer, times the gradient of the metric there.

What a freeze does to z is computed by the model's own attention from the states of the clean pass, softmax and all, so
that only what comes after z is taken to be linear. That is attribution patching (N. Nanda, "Attribution patching:
activation patching at industrial scale", 2023; A. Syed, C. Rager and A. Conmy, "Attribution patching outperforms
automated circuit discovery", 2023) with the softmax recomputed under frozen queries and keys (J. Kramár et al., "AtP*",
2024). On the straight way from the clean to the frozen z the mean gradient in the place of the clean one makes it
integrated gradients (M. Sundararajan, A. Taly and Q. Yan, "Axiomatic attribution for deep networks", 2017).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from tqdm.auto import tqdm

from freeze_core.generators import Generators
from freeze_core.scoring.batches import Batch
from freeze_core.scoring.changes import apart, together
from freeze_core.scoring.estimates import Estimates
from freeze_core.scoring.metrics import Metric
from freeze_core.scoring.passes import Passes
from freeze_core.scoring.sweep import Sweep

__all__ = ["attribution"]


def attribution(sweep: Sweep, ig_steps: int) -> tuple[dict[str, Tensor], float]:
    """Each circuit's estimates `[layer, head]`, and the metric of the clean passes, means over all rows."""
    layers = {layer: sweep.sites.by_layer[layer] for layer in sweep.wanted}
    changes = {
        layer: together(layers[layer], [one.freeze for one in several]) for layer, several in sweep.wanted.items()
    }
    sums = {layer: [0.0] * len(several) for layer, several in sweep.wanted.items()}
    clean_sum = 0.0
    generators = Generators(sweep.model)
    before = generators.states()
    try:
        with (
            tqdm(desc="attribution", unit="pass", disable=not sweep.progress) as bar,
            torch.compiler.set_stance("force_eager"),  # what is compiled would be compiled anew to be listened to
        ):
            for number, batch in enumerate(sweep.batches):
                passes = Passes(sweep.model, sweep.sites, _differentiable(batch), generators)
                measure = partial(_measured, sweep.metric, number, batch)
                estimates = Estimates(passes, layers, measure, bar.update)
                with estimates.running(gradients=not ig_steps):
                    clean_sum += estimates.clean
                    z = estimates.changed(changes)
                    if number == 0:
                        mixed = {
                            layer: apart(layers[layer], changes[layer].wanted) for layer in estimates.mixed(changes, z)
                        }
                        changes.update(mixed)
                        z.update(estimates.changed(mixed))
                    for layer, of_layer in changes.items():
                        by_freeze = estimates.effects(layer, z[layer], ig_steps)
                        for index in range(len(sums[layer])):
                            sums[layer][index] += of_layer.total(index, by_freeze)
    finally:
        generators.put(before)
    means = [total / sweep.rows for totals in sums.values() for total in totals]
    return sweep.table(means), clean_sum / sweep.rows


def _measured(metric: Metric, number: int, batch: Batch, logits: Tensor, clean: Tensor, what: str) -> Tensor:
    return metric.values(number, batch, logits, clean, what)


def _differentiable(batch: Batch) -> Batch:
    """The batch, with arguments that a graph may keep: those made in inference mode are copied."""
    arguments = {
        name: value.clone() if isinstance(value, Tensor) and value.is_inference() else value
        for name, value in batch.arguments.items()
    }
    return replace(batch, arguments=arguments)
