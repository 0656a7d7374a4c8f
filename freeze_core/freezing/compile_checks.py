"""Checks of values that a compiled pass keeps: tracing sees shapes, and `fullgraph=True` allows no step outside."""

from __future__ import annotations

import torch
from torch import Tensor

from freeze_core.errors import InterventionError
from freeze_core.ordinary import unwrapped

__all__ = ["require"]


def require(value: Tensor, holds: Tensor | bool, message: str) -> Tensor:
    """`value`, if `holds`, a bool or a tensor of one, is true.

    Raises:
        InterventionError: `message`, when the pass runs, also where it is compiled.
    """
    if holds is True:
        return value
    if torch.compiler.is_compiling():
        required: Tensor = _required(value, holds if isinstance(holds, Tensor) else torch.tensor(holds), message)
        return required
    if isinstance(holds, Tensor):
        holds = bool(unwrapped(holds).all())  # under vmap it is one of each sample: all are to hold
    if not holds:
        raise InterventionError(message)
    return value


@torch.library.custom_op("circuitfreeze::require", mutates_args=())
def _required(value: Tensor, holds: Tensor, message: str) -> Tensor:
    if not holds:
        raise InterventionError(message)
    return value.clone()


@_required.register_fake
def _(value: Tensor, holds: Tensor, message: str) -> Tensor:
    return torch.empty_like(value)
