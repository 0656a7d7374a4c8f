"""Libraries that some results take, and that freezing does without."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["extra"]


def extra(library: str, what: str) -> Any:
    """A library of the extra `studies`.

    Args:
        what: what it is for, and what does without it.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return import_module(library)
    except ImportError as error:
        raise ImportError(
            f"{library} cannot be imported ({error}): {what}: pip install 'pytest-circuitfreeze[studies]'"
        ) from error
