"""Marks on key-value caches: under which freezes a cache was filled.

A cache object carries its mark as a plain string attribute, which deepcopy, crop and reorder leave in place.
"""

from __future__ import annotations

import warnings
from typing import Any, NoReturn

from freeze_core.errors import InterventionError, StaleCacheWarning

__all__ = ["check_cache", "filled", "mark_cache", "refuse_reordering"]

ATTRIBUTE = "_circuitfreeze_mark"
LENGTH = "_circuitfreeze_length"
"""Tokens that the cache held when it was marked: more than that were added without a mark."""

UNFROZEN = "|"
"""The mark of a cache that carries none: filled without a freeze. What is before the bar is its storage."""


def filled(cache: Any) -> int:
    """Tokens in a cache; 0 where there is none."""
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


def check_cache(cache: Any, mark: str, on_stale: str) -> None:
    """Refuses, warns of, or lets pass a filled cache whose mark is not `mark`.

    Raises:
        InterventionError: the cache stores other heads than this pass would, or `on_stale` is `error`.
    """
    found = getattr(cache, ATTRIBUTE, UNFROZEN)
    grown = filled(cache) > getattr(cache, LENGTH, filled(cache))
    if found == mark and not (grown and mark != UNFROZEN):
        return
    if found.partition("|")[0] != mark.partition("|")[0]:
        raise InterventionError(
            "this cache stores other KV heads than this pass does: under kv_scope='head' every query head has its own, "
            "so a cache cannot be carried across; fill it anew under this freeze (recompute_cache)"
        )
    message = (
        "this cache was filled without the freeze that it is now used under, or under another one: what it holds of "
        "earlier tokens is not frozen alike; fill it anew under this freeze (recompute_cache)"
    )
    if on_stale == "error":
        raise InterventionError(message)
    if on_stale == "warn":
        warnings.warn(message, StaleCacheWarning, stacklevel=2)


def mark_cache(cache: Any, mark: str, before: int) -> None:
    """Marks a cache that a pass under `mark` has filled further; one that was filled otherwise before stays foreign."""
    found = getattr(cache, ATTRIBUTE, UNFROZEN)
    if before == 0 or found == mark:
        setattr(cache, ATTRIBUTE, mark)
    else:
        setattr(cache, ATTRIBUTE, f"{mark.partition('|')[0]}|mixed")
    setattr(cache, LENGTH, filled(cache))


def refuse_reordering(cache: Any) -> None:
    """Makes a cache refuse to have its rows reordered, as beam search does between passes."""
    cache.reorder_cache = cache.batch_select_indices = _refuse_reordering


def _refuse_reordering(*args: Any, **kwargs: Any) -> NoReturn:
    raise InterventionError(
        "freeze_type 'resample' takes each row's values from another row, and the rows of this cache are to be "
        "reordered (beam search): decode greedily or by sampling, or freeze otherwise"
    )
