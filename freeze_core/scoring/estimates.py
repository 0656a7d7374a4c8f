"""Estimates over one batch of what freezes do to a metric: the change of z times the gradient of the metric at z."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from freeze_core.attention.layout import AttentionSite
from freeze_core.errors import InterventionError, UnsupportedModelError
from freeze_core.freezing.plan import LayerFreeze
from freeze_core.scoring.changes import Changes
from freeze_core.scoring.heard import Heads
from freeze_core.scoring.passes import Passes
from freeze_core.scoring.prefix import close

__all__ = ["Estimates"]

ROUNDING = 64
"""By how many units of rounding of the largest value two passes may differ that come to the same."""


class Estimates:
    """Passes over one batch, each drawing what the clean one draws, and the estimates that they make.

    Args:
        passes: runs them.
        sites: the layers that are heard.
        measure: the metric `[row]` of logits, given the clean ones and what they are of.
        ran: called after each pass.
    """

    def __init__(
        self,
        passes: Passes,
        sites: Mapping[int, AttentionSite],
        measure: Callable[[Tensor, Tensor, str], Tensor],
        ran: Callable[[], object],
    ) -> None:
        self._passes = passes
        self._sites = sites
        self._measure = measure
        self._ran = ran
        self._heads = Heads(sites)
        self._logits = torch.empty(0)
        self._z: dict[int, list[Tensor]] = {}
        self._gradients: dict[int, list[Tensor]] = {}
        self.clean = 0.0

    @contextmanager
    def running(self, gradients: bool) -> Iterator[None]:
        """Runs the clean pass, and back if its `gradients` are wanted; then all else can be called."""
        with self._heads.attached():
            with torch.set_grad_enabled(gradients):
                logits, z = self._heads.clean(self._passes.whole)
                self._logits = logits.detach()
                rows = self._measure(logits, self._logits, "unfrozen")
            self.clean = float(rows.detach().sum())
            if gradients:
                self._gradients = _differentiated(rows, z)
            self._z = {layer: [one.detach() for one in runs] for layer, runs in z.items()}
            self._ran()
            yield

    def changed(self, changes: Mapping[int, Changes]) -> dict[int, list[list[Tensor]]]:
        """The z of each layer under each of its freezes, in each run."""
        z: dict[int, list[list[Tensor]]] = {layer: [] for layer in changes}
        for number in range(max((len(one.freezes) for one in changes.values()), default=0)):
            freezes = {layer: one.freezes[number] for layer, one in changes.items() if number < len(one.freezes)}
            for layer, runs in self._under(freezes).items():
                z[layer].append(runs)
        return z

    def mixed(self, changes: Mapping[int, Changes], z: Mapping[int, Sequence[Sequence[Tensor]]]) -> list[int]:
        """The layers whose heads are no heads apart: the first one frozen by itself is not what it is among all."""

        def alike(layer: int, runs: Sequence[Tensor]) -> bool:
            several = zip(runs, self._z[layer], *z[layer], strict=True)
            return all(
                close(own, changes[layer].z(0, clean, by_freeze), _bound(own)) for own, clean, *by_freeze in several
            )

        alone = self._under({layer: one.wanted[0] for layer, one in changes.items() if one.freezes})
        return [layer for layer, runs in alone.items() if not alike(layer, runs)]

    def effects(self, layer: int, z: Sequence[Sequence[Tensor]], ig_steps: int) -> list[Tensor]:
        """What the change of each head's z comes to, `[head]` in float64, for each freeze of a layer.

        Args:
            z: of the layer under each freeze, in each run.
            ig_steps: gradients are means over so many points on the way there; 0 is those of the clean pass.
        """
        by_freeze = []
        for runs in z:
            gradients = self._on_the_way(layer, runs, ig_steps) if ig_steps else self._gradients[layer]
            effect = torch.zeros(self._sites[layer].heads, dtype=torch.float64)
            for gradient, frozen, clean in zip(gradients, runs, self._z[layer], strict=True):
                # Chosen, not multiplied: what counts for nothing may be nan, at padding.
                products = torch.where(gradient == 0, 0, gradient.double() * (frozen.double() - clean.double()))
                effect += products[..., self._sites[layer].layout.z].sum(-1).flatten(0, -2).sum(0).cpu()
            by_freeze.append(effect)
        return by_freeze

    def _under(self, freezes: Mapping[int, LayerFreeze]) -> dict[int, list[Tensor]]:
        """The z of each run of each layer, under a freeze of each of them."""
        with torch.no_grad():
            logits, z = self._heads.frozen(partial(self._passes.whole, list(freezes.values())))
        self._ran()
        if not close(logits, self._logits, _bound(logits)):
            raise UnsupportedModelError(
                f"what is frozen in layers {sorted(freezes)} reaches the logits by other ways than through what their "
                "attention gives (keys and values that later layers read, say), which an estimate there does not see: "
                "use method='exact'"
            )
        return {layer: z[layer] for layer in freezes}

    def _on_the_way(self, layer: int, frozen: Sequence[Tensor], ig_steps: int) -> list[Tensor]:
        """The mean gradient at the z of each run, in the middle of each step of the straight way to the frozen ones."""
        means = [torch.zeros_like(one) for one in frozen]
        for step in range(ig_steps):
            share = (step + 0.5) / ig_steps
            between = [clean.lerp(one, share) for clean, one in zip(self._z[layer], frozen, strict=True)]
            with torch.enable_grad():
                logits, z = self._heads.replaced(layer, between, self._passes.whole)
                rows = self._measure(logits, self._logits, f"on the way to a freeze of layer {layer}")
            self._ran()
            for mean, gradient in zip(means, _differentiated(rows, {layer: z})[layer], strict=True):
                mean += gradient / ig_steps
        return means


def _bound(like: Tensor) -> float:
    return ROUNDING * torch.finfo(like.dtype).eps


def _differentiated(rows: Tensor, z: Mapping[int, Sequence[Tensor]]) -> dict[int, list[Tensor]]:
    """The gradients of the sum of `rows` at the z of each run of each layer.

    Raises:
        InterventionError: there are none.
    """
    several = [(layer, one) for layer, runs in z.items() for one in runs]
    if not rows.requires_grad:
        raise InterventionError(
            "metric: its values carry no gradient, which estimates need (it leaves torch, takes argmax, or the model "
            "runs without gradients): give one that can be differentiated, or use method='exact'"
        )
    found = torch.autograd.grad(rows.sum(), [one for _, one in several], allow_unused=True)
    gradients: dict[int, list[Tensor]] = {layer: [] for layer in z}
    for (layer, _), gradient in zip(several, found, strict=True):
        if gradient is None or not bool(gradient.isfinite().all()):
            what = "does not reach" if gradient is None else "is not finite in"
            raise InterventionError(
                f"the gradient of the metric {what} layer {layer}, and an estimate needs it: use method='exact'"
            )
        gradients[layer].append(gradient)
    return gradients
