"""Which tokens are padding, told from the mask that a stack of layers is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from freeze_core.errors import InterventionError
from freeze_core.freezing.traced import demand

__all__ = ["padding_mask"]


def padding_mask(mask: Any) -> Tensor | None:
    """The padding mask `[batch, token]`, true where a token is real; `None` where none is padding.

    Args:
        mask: `None`, a padding mask, or what some families (BERT's) make of it before their layers see it,
            `[batch, 1, query, key]`, bool or added to scores: nothing hides a key but padding and causality.

    Raises:
        InterventionError: it is a mask that padding cannot be told from.
    """
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.bool()
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] == 1:
        return _of_scores(mask[:, 0])
    raise InterventionError(_refusal(mask))


def _of_scores(mask: Tensor) -> Tensor:
    seen = mask if mask.dtype == torch.bool else mask == 0
    queries, keys = mask.shape[1:]
    real = seen[:, -1]  # the last query sees all that is not padding
    at = torch.arange(keys, device=mask.device)
    causal = at <= at[keys - queries :, None]
    # A padded query may be let to see everything, so that it sees something.
    freed = ~real[:, keys - queries :, None] & seen.all(-1, keepdim=True)
    plain = ((seen == (real[:, None] & causal)) | freed).all() | ((seen == real[:, None]) | freed).all()
    return demand(real, plain, _refusal(mask))


def _refusal(mask: Any) -> str:
    shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    return (
        f"attention_mask is {shape}: a freeze that depends on padding needs a padding mask [batch, token]; "
        "pass one, or freeze with zero or with noise_std"
    )
