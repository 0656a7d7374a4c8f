"""What a study was made of: by it, two files can be told to be of the same model and the same data."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from torch import Tensor, nn

from freeze_core.attention.sites import Sites
from freeze_core.scoring.batches import Batch
from freeze_core.statistics import digest_of, model_identity

__all__ = ["origin_of"]


def origin_of(model: nn.Module, sites: Sites, batches: Sequence[Batch]) -> dict[str, str]:
    """The model (class, dtype, a hash of its attention), a hash of the data, and the versions of what ran."""
    tensors = [
        values
        for batch in batches
        for _, values in sorted(batch.arguments.items())
        if isinstance(values, Tensor) and values.numel()
    ]
    parameter: Any = next(model.parameters())
    return {
        "model": type(model).__name__,
        "dtype": str(parameter.dtype),
        "identity": model_identity(sites),
        "data": digest_of(tensors),
        **{name: version(name) for name in ("pytest-circuitfreeze", "torch", "transformers", "scipy")},
    }
