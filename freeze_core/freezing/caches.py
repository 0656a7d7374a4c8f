"""Marks on key-value caches: under which freezes a cache was filled.

A cache object carries its mark as a plain attribute, which copies, crop and reorder leave in place. A shallow copy
shares it as it shares the layers.
"""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass
from typing import Any

from freeze_core.errors import InterventionError, StaleCacheWarning

__all__ = ["check_cache", "check_emptied_cache", "filled", "is_cache", "mark_cache"]

ATTRIBUTE = "_circuitfreeze_mark"

UNFROZEN = "|"
"""The mark of a cache that carries none: filled without a freeze. What is before the bar is its storage."""


@dataclass
class _Mark:
    """Under which freezes a cache was filled, and up to how many tokens: more than that were added without a mark."""

    freezes: str
    length: int


def is_cache(value: Any) -> bool:
    """Whether a value is a cache of keys and values that counts its tokens, as all of transformers' do."""
    return hasattr(value, "get_seq_length")


def filled(cache: Any) -> int:
    """Tokens in a cache; 0 where there is none.

    Raises:
        InterventionError: it cannot be asked as transformers' caches can.
    """
    if not is_cache(cache):
        return 0
    try:
        return int(cache.get_seq_length())
    except TypeError as error:
        raise InterventionError(
            f"{type(cache).__name__}.get_seq_length() raised {type(error).__name__} ({error}): a cache must give the "
            "number of its tokens without arguments, as DynamicCache does; give its arguments defaults"
        ) from error


def check_cache(cache: Any, mark: str, cached: int, on_stale: str) -> None:
    """Refuses, warns of, or lets pass a cache that holds `cached` tokens and whose mark is not `mark`.

    Raises:
        InterventionError: the cache stores other heads than this pass would, or `on_stale` is `error`.
    """
    found: _Mark = getattr(cache, ATTRIBUTE, _Mark(UNFROZEN, cached))
    grown = cached > found.length
    if found.freezes == mark and not (grown and mark != UNFROZEN):
        return
    _check_storage(found.freezes, mark)
    message = (
        "this cache was filled without the freeze that it is now used under, or under another one: what it holds of "
        "earlier tokens is not frozen alike; fill it anew under this freeze (recompute_cache)"
    )
    if on_stale == "error":
        raise InterventionError(message)
    if on_stale == "warn":
        warnings.warn(message, StaleCacheWarning, stacklevel=2)


def check_emptied_cache(cache: Any, mark: str) -> None:
    """Refuses a cache that is empty but keeps tensors from before it was emptied, for other heads than this pass has.

    Raises:
        InterventionError: it does (a static cache that was reset, a dynamic one that was cropped to nothing).
    """
    parts = (cache, *(getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")))
    layers = (layer for part in parts for layer in getattr(part, "layers", ()))
    # A layer that reads an earlier layer's keys counts as initialised in a new cache, too, and has none of its own.
    if any(getattr(layer, "is_initialized", False) and getattr(layer, "keys", layer) is not None for layer in layers):
        _check_storage(_freezes(cache), mark)


def _check_storage(found: str, mark: str) -> None:
    if found.partition("|")[0] != mark.partition("|")[0]:
        raise InterventionError(
            "this cache stores other KV heads than this pass does: under kv_scope='head' every query head has its own, "
            "so a cache, even an emptied one, cannot be carried across; make a new one and fill it under this freeze "
            "(recompute_cache)"
        )


def mark_cache(cache: Any, mark: str, before: int, length: int) -> None:
    """Marks a cache that a pass under `mark` has filled further, up to `length` tokens.

    One that was filled otherwise `before` stays foreign.
    """
    if before and _freezes(cache) != mark:
        mark = f"{mark.partition('|')[0]}|mixed"
    if not hasattr(cache, ATTRIBUTE):
        for name in ("crop", "reset"):
            if hasattr(cache, name):
                setattr(cache, name, _Shrinking(cache, name))
        setattr(cache, ATTRIBUTE, _Mark(mark, length))
    known: _Mark = getattr(cache, ATTRIBUTE)
    known.freezes, known.length = mark, length


def _freezes(cache: Any) -> str:
    known: _Mark | None = getattr(cache, ATTRIBUTE, None)
    return known.freezes if known else UNFROZEN


class _Shrinking:
    """A marked cache's own `crop` or `reset`, after which tokens that it gains without a mark are still told apart.

    It does not keep the cache alive; a copy of the cache gets one of its own.
    """

    def __init__(self, cache: Any, name: str) -> None:
        self._cache = weakref.ref(cache)
        self.__name__ = name  # some caches ask their own methods for it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache: Any = self._cache()
        if cache is None:
            raise InterventionError(
                f"{self.__name__} of a shallow copy of a cache that is gone: it shared its layers; use copy.deepcopy"
            )
        given = getattr(type(cache), self.__name__)(cache, *args, **kwargs)
        known: _Mark = getattr(cache, ATTRIBUTE)
        known.length = min(known.length, filled(cache))
        return given

    def __reduce__(self) -> tuple[Any, ...]:
        return _Shrinking, (self._cache(), self.__name__)
