"""Estimates over one batch of what freezes do to a metric: the change of z times the gradient of the metric at z."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from freeze_core.errors import InterventionError, UnsupportedModelError
from freeze_core.freezing.plan import LayerFreeze
from freeze_core.scoring.batch_passes import BatchPasses
from freeze_core.scoring.head_outputs import RecordOutputs, RecordZ, ReplaceOutputs
from freeze_core.scoring.patched_calls import Action, PatchedModule, assign_actions, attach
from freeze_core.scoring.shortcuts import close
from freeze_core.scoring.sweep import Sweep
from freeze_core.scoring.z_decomposition import ZDecomposition

__all__ = ["Estimates"]

ROUNDING = 64
"""By how many units of rounding of the largest value the results of two passes may differ that should be the same."""


class Estimates:
    """Passes over one batch, each drawing what the clean one draws, and the estimates that they make.

    Under a freeze each attention runs from the states of the clean pass, and returns what it gave in the clean pass. So
    one pass under freezes of all layers shows of each layer what its own freeze does to its z.

    Args:
        sweep: the layers in which something is frozen, and the metric.
        number: of the batch.
        passes: runs them.
        after_pass: called after each pass.
    """

    def __init__(self, sweep: Sweep, number: int, passes: BatchPasses, after_pass: Callable[[], object]) -> None:
        self._sweep = sweep
        self._number = number
        self._passes = passes
        self._after_pass = after_pass
        self._sites = sites = {layer: sweep.sites.by_layer[layer] for layer in sweep.wanted}
        self._projections = {layer: PatchedModule(site.layout.output) for layer, site in sites.items()}
        self._attentions = {layer: PatchedModule(site.attention) for layer, site in sites.items()}
        self._outputs = {layer: RecordOutputs(site) for layer, site in sites.items()}
        self._logits = torch.empty(0)
        self._z: dict[int, list[Tensor]] = {}
        self._gradients: dict[int, list[Tensor]] = {}
        self.clean = 0.0

    @contextmanager
    def running(self, gradients: bool) -> Iterator[None]:
        """Runs the clean pass, and back if its `gradients` are wanted; then all else can be called."""
        with attach([*self._projections.values(), *self._attentions.values()]):
            records = {layer: RecordZ(site) for layer, site in self._sites.items()}
            with torch.set_grad_enabled(gradients):
                logits = self._run(records, self._outputs)
                self._logits = logits.detach()
                rows = self._metric(logits, "unfrozen")
            self.clean = float(rows.detach().sum())
            if gradients:
                self._gradients = _gradients({layer: record.z for layer, record in records.items()}, rows)
            self._z = {layer: [one.detach() for one in record.z] for layer, record in records.items()}
            self._after_pass()
            yield

    def frozen_z(self, decompositions: Mapping[int, ZDecomposition]) -> dict[int, list[list[Tensor]]]:
        """The z of each layer under each of its freezes, in each run: by layer, freeze and run `[..., feature]`."""
        z: dict[int, list[list[Tensor]]] = {layer: [] for layer in decompositions}
        for number in range(max((len(one.freezes) for one in decompositions.values()), default=0)):
            freezes = {layer: one.freezes[number] for layer, one in decompositions.items() if number < len(one.freezes)}
            for layer, runs in self._z_under(freezes).items():
                z[layer].append(runs)
        return z

    def mixing_layers(
        self, decompositions: Mapping[int, ZDecomposition], z: Mapping[int, Sequence[Sequence[Tensor]]]
    ) -> list[int]:
        """The layers in which heads mix before z: freezing one alone is not the same as freezing it among all."""

        def is_same(layer: int, runs: Sequence[Tensor]) -> bool:
            return all(
                close(alone, decompositions[layer].z(0, clean, frozen), _bound(alone))
                for alone, clean, *frozen in zip(runs, self._z[layer], *z[layer], strict=True)
            )

        alone = self._z_under({layer: one.wanted[0] for layer, one in decompositions.items() if one.freezes})
        return [layer for layer, runs in alone.items() if not is_same(layer, runs)]

    def effects(self, layer: int, z: Sequence[Sequence[Tensor]], ig_steps: int) -> list[Tensor]:
        """The estimated effect of the change of each head's z, `[head]` in float64, for each freeze of a layer.

        Args:
            z: of the layer under each freeze, in each run.
            ig_steps: gradients are means over so many points on the way there; 0 is those of the clean pass.
        """
        by_freeze = []
        for runs in z:
            gradients = self._mean_gradients(layer, runs, ig_steps) if ig_steps else self._gradients[layer]
            effect = torch.zeros(self._sites[layer].heads, dtype=torch.float64)
            for gradient, frozen, clean in zip(gradients, runs, self._z[layer], strict=True):
                # Selected, not multiplied: where the gradient is 0, at padding, z may be nan.
                products = torch.where(gradient == 0, 0, gradient.double() * (frozen.double() - clean.double()))
                effect += products[..., self._sites[layer].layout.z].sum(-1).flatten(0, -2).sum(0).cpu()
            by_freeze.append(effect)
        return by_freeze

    def _z_under(self, freezes: Mapping[int, LayerFreeze]) -> dict[int, list[Tensor]]:
        """The z of each run of each layer, under a freeze of each of them."""
        records = {layer: RecordZ(self._sites[layer]) for layer in freezes}
        attentions = {layer: ReplaceOutputs(recorded.outputs) for layer, recorded in self._outputs.items()}
        with torch.no_grad():
            logits = self._run(records, attentions, list(freezes.values()))
        self._after_pass()
        if not close(logits, self._logits, _bound(logits)):
            raise UnsupportedModelError(
                f"what is frozen in layers {sorted(freezes)} reaches the logits by other ways than through what their "
                "attention gives (keys and values that later layers read, say), which an estimate there does not see: "
                "use method='exact'"
            )
        return {layer: [one.detach() for one in record.z] for layer, record in records.items()}

    def _mean_gradients(self, layer: int, frozen: Sequence[Tensor], ig_steps: int) -> list[Tensor]:
        """The mean gradient at the z of each run, in the middle of each step of the straight way to the frozen ones."""
        means = [torch.zeros_like(one) for one in frozen]
        for step in range(ig_steps):
            share = (step + 0.5) / ig_steps
            between = [clean.lerp(one, share) for clean, one in zip(self._z[layer], frozen, strict=True)]
            record = RecordZ(self._sites[layer], between)
            with torch.enable_grad():
                logits = self._run({layer: record})
                rows = self._metric(logits, f"on the way to a freeze of layer {layer}")
            self._after_pass()
            for mean, gradient in zip(means, _gradients({layer: record.z}, rows)[layer], strict=True):
                mean += gradient / ig_steps
        return means

    def _metric(self, logits: Tensor, where: str) -> Tensor:
        """The metric of each row `[row]`, with its gradient."""
        return self._sweep.metric.values(self._number, self._passes.batch, logits, self._logits, where)

    def _run(
        self,
        projections: Mapping[int, Action],
        attentions: Mapping[int, Action] | None = None,
        freezes: Sequence[LayerFreeze] = (),
    ) -> Tensor:
        """The logits of a pass with these actions. They end with it, since a backward pass may run a layer again."""
        actions = [(self._projections[layer], action) for layer, action in projections.items()]
        actions += [(self._attentions[layer], action) for layer, action in (attentions or {}).items()]
        with assign_actions(actions):
            return self._passes.whole(freezes)


def _bound(like: Tensor) -> float:
    return ROUNDING * torch.finfo(like.dtype).eps


def _gradients(z: Mapping[int, Sequence[Tensor]], rows: Tensor) -> dict[int, list[Tensor]]:
    """The gradients of the sum of `rows` at the z of each run of each layer.

    Raises:
        InterventionError: there are none.
    """
    if not rows.requires_grad:
        raise InterventionError(
            "metric: its values carry no gradient, which estimates need (it leaves torch, takes argmax, or the model "
            "runs without gradients): give one that can be differentiated, or use method='exact'"
        )
    flat = [(layer, one) for layer, runs in z.items() for one in runs]
    found = torch.autograd.grad(rows.sum(), [one for _, one in flat], allow_unused=True)
    gradients: dict[int, list[Tensor]] = {layer: [] for layer in z}
    for (layer, _), gradient in zip(flat, found, strict=True):
        if gradient is None or not bool(gradient.isfinite().all()):
            what = "does not reach" if gradient is None else "is not finite in"
            raise InterventionError(
                f"the gradient of the metric {what} layer {layer}, and an estimate needs it: use method='exact'"
            )
        gradients[layer].append(gradient)
    return gradients
