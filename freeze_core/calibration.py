"""Activation statistics over a data set, gathered in one pass over it with memory that does not grow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from freeze_core.activations import Recording
from freeze_core.arguments import check_flag, refuse
from freeze_core.config import InterventionConfig
from freeze_core.errors import InterventionError
from freeze_core.freezing.requests import resolve
from freeze_core.freezing.unfrozen import unfrozen_sites
from freeze_core.identity import model_identity
from freeze_core.recording import record
from freeze_core.statistics import ActivationStatistics, LayerStatistics
from freeze_core.vocabulary import ROLES, Role

__all__ = ["calibrate"]


class _Moments:
    """Mean and squared deviations of a stream of samples `[sample, ...]`, in float64.

    Batches are merged as by T. F. Chan, G. H. Golub and R. J. LeVeque, "Updating formulae and a pairwise algorithm for
    computing sample variances", 1979, which does not lose the variance to cancellation.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor = torch.zeros(())
        self.squares: Tensor = torch.zeros(())

    def add(self, samples: Tensor) -> None:
        samples = samples.to("cpu", torch.float64)  # where every device's statistics can be kept and compared
        count, mean = len(samples), samples.mean(dim=0)
        squares = (samples - mean).square().sum(dim=0)
        total = self.count + count
        step = mean - self.mean
        self.mean = self.mean + step * (count / total)
        self.squares = self.squares + squares + step.square() * (self.count * count / total)
        self.count = total

    def std(self) -> Tensor:
        return (self.squares / self.count).sqrt()


def calibrate(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Any]],
    layers: Sequence[int] | None = None,
    progress: bool = True,
    attention: str = "self",
) -> ActivationStatistics:
    """Means and population standard deviations of q, k, v and z of each head over `batches`, padding left out.

    Args:
        model: unfrozen; it runs as it is, in its own mode, without gradients.
        batches: token ids `[batch, token]`, embeddings, or dicts of model arguments, of any sizes; a data loader is
            one. A padding mask is taken from a dict's `attention_mask`.
        layers: decoder layers, negative ones count from the end; `None` is all that have attention.
        progress: show a bar on long work.
        attention: `self`, `cross` or `encoder`.

    Raises:
        InterventionError: no batch, a frozen model, a batch without a real token, or activations that are not finite.
    """
    config = InterventionConfig(layer_indices=layers, attention=attention)
    sites = unfrozen_sites(model, config.attention)
    check_flag("progress", progress)
    if not isinstance(batches, Iterable) or isinstance(batches, str | bytes | Mapping):
        refuse("batches", batches, "an iterable of token ids, or of dicts")
    wanted = [freeze.layer for freeze in resolve(config, sites)]
    moments = {(layer, role): _Moments() for layer in wanted for role in ROLES}
    tokens = 0
    for number, batch in enumerate(tqdm(batches, desc="calibrate", unit="batch", disable=not progress)):
        recording = record(model, batch, wanted, attention=attention)
        tokens += _add(moments, recording, number)
    if not tokens:
        raise InterventionError("batches is empty: give at least one batch of token ids")
    return ActivationStatistics(
        {
            layer: LayerStatistics(
                {role: moments[layer, role].mean for role in ROLES},
                {role: moments[layer, role].std() for role in ROLES},
            )
            for layer in wanted
        },
        tokens,
        model_identity(sites),
        attention,
    )


def _add(moments: Mapping[tuple[int, Role], _Moments], recording: Recording, number: int) -> int:
    """Adds the real positions of one batch, and says how many they were."""
    real = 0
    for (layer, role), moment in moments.items():
        activation: Tensor = getattr(recording[layer], role)
        if activation.dim() > 4:  # each run of the layer has statistics of its own
            activation = activation.movedim(0, 2)
        mask = recording.mask_of(role)
        if mask is not None and mask.shape != activation.shape[:2]:
            raise InterventionError(
                f"batch {number}: attention_mask is {list(mask.shape)} and the activations are "
                f"{list(activation.shape[:2])} [batch, token]: give a padding mask of the same shape"
            )
        samples = activation.flatten(0, 1) if mask is None else activation[mask.bool().to(activation.device)]
        if not len(samples) or not bool(torch.isfinite(samples).all()):
            what = "has no real token" if not len(samples) else f"gives {role} of layer {layer} that are not finite"
            raise InterventionError(f"batch {number} {what}: leave it out")
        moment.add(samples)
        real = max(real, len(samples))
    return real
