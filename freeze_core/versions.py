"""The newest releases that this version was run with, and what to say beside newer ones."""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version

__all__ = ["NEWEST_RUN", "newer_than_run", "release_numbers"]

NEWEST_RUN = {"torch": "2.15.0", "transformers": "5.24.0"}
"""Those of the newest environment in docs/versions; a test compares the two."""


def newer_than_run() -> str:
    """A sentence for each installed library that is newer than the newest release that was run; mostly empty."""
    return "; ".join(
        f"{library} {installed} is newer than {newest}, the newest release this version was run with"
        for library, newest in NEWEST_RUN.items()
        if release_numbers(installed := _installed(library)) > release_numbers(newest)
    )


@cache
def _installed(library: str) -> str:
    """An installed version; empty for a library without metadata, such as a checkout on the path.

    It is looked up for the first error and not at import, since reading metadata takes some milliseconds.
    """
    try:
        return version(library)
    except PackageNotFoundError:
        return ""


def release_numbers(text: str) -> tuple[int, ...]:
    """The numbers of a release, for comparison: `2.13.0+cpu` and `2.13.0rc1` are of release (2, 13, 0)."""
    release = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, release[0].split(".")[:3])) if release else ()
