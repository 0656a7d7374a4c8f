"""First-order scores: what each freeze does to the z of its layer, times the gradient of the metric there.

What a freeze does to z is computed by the model's own attention from the states of the clean pass, with the softmax, so
that only what comes after z is assumed to be linear. That is attribution patching (N. Nanda, "Attribution patching:
activation patching at industrial scale", 2023; A. Syed, C. Rager and A. Conmy, "Attribution patching outperforms
automated circuit discovery", 2023) with the softmax recomputed under frozen queries and keys (J. Kramár et al., "AtP*",
2024). With the mean gradient on the straight way from the clean to the frozen z in place of the clean gradient, it is
integrated gradients (M. Sundararajan, A. Taly and Q. Yan, "Axiomatic attribution for deep networks", 2017).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from freeze_core.generators import Generators
from freeze_core.scoring.batch_passes import BatchPasses
from freeze_core.scoring.batches import Batch
from freeze_core.scoring.estimates import Estimates
from freeze_core.scoring.sweep import Sweep
from freeze_core.scoring.z_decomposition import freeze_all_heads, freeze_one_by_one

__all__ = ["attribution"]


def attribution(sweep: Sweep, ig_steps: int) -> tuple[dict[str, Tensor], float]:
    """Each circuit's estimates `[layer, head]`, and the metric of the clean passes, means over all rows."""
    sites = {layer: sweep.sites.by_layer[layer] for layer in sweep.wanted}
    wanted = {layer: [one.freeze for one in of_layer] for layer, of_layer in sweep.wanted.items()}
    decompositions = {layer: freeze_all_heads(site, wanted[layer]) for layer, site in sites.items()}
    sums = {layer: [0.0] * len(freezes) for layer, freezes in wanted.items()}
    clean_sum = 0.0
    generators = Generators(sweep.model)
    before = generators.states()
    try:
        with (
            tqdm(desc="attribution", unit="pass", disable=not sweep.show_progress) as bar,
            torch.compiler.set_stance("force_eager"),  # compiled layers would be compiled anew for each action
        ):
            for number, batch in enumerate(sweep.batches):
                passes = BatchPasses(sweep.model, sweep.sites, _without_inference_tensors(batch), generators)
                estimates = Estimates(sweep, number, passes, bar.update)
                with estimates.running(gradients=not ig_steps):
                    clean_sum += estimates.clean
                    z = estimates.frozen_z(decompositions)
                    if number == 0:
                        mixing = estimates.mixing_layers(decompositions, z)
                        one_by_one = {layer: freeze_one_by_one(sites[layer], wanted[layer]) for layer in mixing}
                        decompositions |= one_by_one
                        z |= estimates.frozen_z(one_by_one)
                    for layer, decomposition in decompositions.items():
                        effects = estimates.effects(layer, z[layer], ig_steps)
                        for index in range(len(sums[layer])):
                            sums[layer][index] += decomposition.total(index, effects)
    finally:
        generators.put(before)
    means = [total / sweep.rows for totals in sums.values() for total in totals]
    return sweep.table(means), clean_sum / sweep.rows


def _without_inference_tensors(batch: Batch) -> Batch:
    """The batch, with arguments that a graph may keep: those made in inference mode are copied."""
    arguments = {
        name: value.clone() if isinstance(value, Tensor) and value.is_inference() else value
        for name, value in batch.arguments.items()
    }
    return replace(batch, arguments=arguments)
