"""One thread for small models, whose tensors are too small to share out: more threads would wait for each other."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

SMALL = 1_000_000
"""Parameters below which a model is small: its matrices have some hundred rows at most."""


def is_small(model: object) -> bool:
    """Whether `model` is one with few parameters."""
    parameters = getattr(model, "parameters", None)
    return parameters is not None and sum(one.numel() for one in parameters()) < SMALL


@contextmanager
def one_thread() -> Iterator[None]:
    """Lets torch compute in one thread for the length of the block, if torch was imported at all.

    Measured on two busy cores: half of the shipped tests took 305 s with two threads, and 36 s with one.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
