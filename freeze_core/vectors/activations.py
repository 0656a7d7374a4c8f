"""What the residual stream is at chosen positions of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from freeze_core.errors import InterventionError
from freeze_core.generators import Generators
from freeze_core.inputs import run
from freeze_core.scoring.batches import Batch
from freeze_core.vectors.sites import ResidualSite, stream_of

__all__ = ["activations"]


def activations(model: nn.Module, site: ResidualSite, batches: Sequence[Batch]) -> Tensor:
    """The stream of each prompt, the mean over its positions that are not padding, `[prompt, hidden]` in float64.

    The last layer's is that before the final norm, other than in `output_hidden_states` of transformers.

    Raises:
        InterventionError: the layer did not run once, or gives no such stream, or what is not finite.
    """
    with Generators(model).restored():
        return torch.cat([_of_batch(model, site, batch) for batch in batches])


def _of_batch(model: nn.Module, site: ResidualSite, batch: Batch) -> Tensor:
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(stream_of(output, site.name))

    handle = site.module.register_forward_hook(keep)
    try:
        with torch.no_grad():
            run(model, batch.arguments)
    finally:
        handle.remove()
    if len(seen) != 1:
        raise InterventionError(f"{site.name} ran {len(seen)} times in one pass: its stream cannot be told")
    stream = seen[0]
    if stream.shape[:2] != (batch.rows, batch.columns):
        raise InterventionError(
            f"{site.name} gives {list(stream.shape)} for {[batch.rows, batch.columns]} [prompt, token]: its columns "
            "are not those of the tokens"
        )
    at = batch.at_positions(stream).detach().to("cpu", torch.float64)
    real = batch.real[..., None]
    if not bool(torch.where(real, at, 0).isfinite().all()):
        raise InterventionError(
            f"the stream after {site.name} is not finite in some prompt: leave it out, or run in a wider dtype"
        )
    return torch.where(real, at, 0).sum(1) / real.sum(1)
