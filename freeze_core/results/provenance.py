"""What a study was made of: by it, two files can be told to be of the same model and the same data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from freeze_core.attention.layout import Sites
from freeze_core.files import parsed
from freeze_core.identity import model_identity
from freeze_core.statistics import digest_of

if TYPE_CHECKING:
    from freeze_core.scoring.batches import Batch

__all__ = ["plain", "provenance_in", "provenance_of"]


def provenance_of(model: nn.Module, sites: Sites, batches: Sequence[Batch]) -> dict[str, str]:
    """The model (class, dtype, a hash of its weights), a hash of the data, and the versions of what ran."""
    given = [
        (name, values)
        for batch in batches
        for name, values in sorted(batch.arguments.items())
        if isinstance(values, Tensor) and values.numel()
    ]
    shapes = repr([(name, list(values.shape)) for name, values in given]).encode()
    data = digest_of([torch.tensor(list(shapes), dtype=torch.uint8), *(values for _, values in given)])
    parameter: Any = next(model.parameters())
    return {
        "model": type(model).__name__,
        "dtype": str(parameter.dtype),
        "identity": model_identity(sites),
        "data": data,
        **{name: version(name) for name in ("pytest-circuitfreeze", "torch", "transformers", "scipy")},
    }


def provenance_in(facts: Mapping[str, str]) -> dict[str, str]:
    """What the facts of a file say of its model and data, the model first.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: nothing, or of no model.
    """
    told: dict[str, str] = parsed(facts["origin"])
    return {"model": told.pop("model"), **told}


def plain(value: Any) -> Any:
    """An argument as JSON holds it: indices, ids or positions as ints and lists, texts and `None` as they are."""
    return value if value is None or isinstance(value, str) else torch.as_tensor(value).tolist()
