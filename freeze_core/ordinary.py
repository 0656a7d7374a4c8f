"""Tensors that outlive the call that makes them, whatever mode the caller is in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

__all__ = ["ordinary_tensors", "unwrapped"]


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Makes new tensors ordinary ones on the CPU, without a gradient: a freeze is used in other modes than it was made.

    An inference tensor cannot be saved for a backward pass, and one on the default device `meta` has no values. A
    default device is left only where it is not the CPU, since that slows every call of torch.
    """
    on_cpu = torch.get_default_device().type == "cpu"
    with torch.inference_mode(False), torch.no_grad(), nullcontext() if on_cpu else torch.device("cpu"):
        yield


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor itself, without the wrappers of the transforms of `torch.func` that it may be in.

    Torch has a function for this from 2.7 on.
    """
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor
