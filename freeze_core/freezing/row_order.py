"""Rows that must stay where they are between passes, since a freeze takes one row's values from another."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from freeze_core.errors import InterventionError
from freeze_core.ordinary import unwrapped

__all__ = ["RowOrder", "refuse_reordering"]


def refuse_reordering(cache: Any, order: RowOrder) -> None:
    """Makes a cache refuse to have its rows reordered, as beam search does between passes, while `order` is needed."""
    for name in ("reorder_cache", "batch_select_indices"):
        if hasattr(type(cache), name):
            setattr(cache, name, _Reordering(cache, name, order))


class _Reordering:
    """A cache's own way to reorder its rows, refused while a freeze needs them where they are.

    The cache outlives the freeze: then it reorders as its class does. This does not keep the cache alive; a deep copy
    gets one of its own, and one that was pickled is back in no freeze.
    """

    def __init__(self, cache: Any, name: str, order: RowOrder) -> None:
        self._cache = weakref.ref(cache)
        self.__name__ = name  # some caches ask their own methods for it
        self._order = order

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._order.needed:
            raise InterventionError(
                "freeze_type 'resample' takes each row's values from another row, and the rows of this cache are to be "
                "reordered (beam search): decode greedily or by sampling, or freeze otherwise"
            )
        cache: Any = self._cache()
        if cache is None:
            raise InterventionError(
                f"{self.__name__} of a shallow copy of a cache that is gone: it shared its layers; use copy.deepcopy"
            )
        vars(cache).pop(self.__name__, None)
        return getattr(type(cache), self.__name__)(cache, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Reordering:
        return _Reordering(memo[id(self._cache())], self.__name__, self._order)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._cache(), self.__name__)


class RowOrder:
    """Tells from the tokens of one pass after another, where there is no cache, whether rows have changed places.

    Each row of a pass that decodes is a row of the pass before and one token more. It is told only where it can matter:
    rows of the same tokens may change places unseen, and each then has what it would have had.
    """

    def __init__(self) -> None:
        self.needed = False
        """Whether some freeze that is live takes one row's values from another."""
        self._before: Tensor | None = None

    def check(self, ids: Tensor | None) -> None:
        """Notes the tokens `[row, token]` of a pass.

        Raises:
            InterventionError: they go on from those of the pass before, in another order.
        """
        if ids is not None:
            ids = unwrapped(ids).detach()  # kept beyond the transform of torch.func that it may be of
        before, self._before = self._before, None if ids is None else ids.clone()
        if ids is None or before is None or ids.dim() != 2 or before.shape != ids[:, :-1].shape:
            return
        earlier = ids[:, :-1]
        if bool((earlier == before).all()):
            return
        if bool((earlier[:, None] == before).all(-1).any(-1).all()):
            raise InterventionError(
                "freeze_type 'resample' takes each row's values from another row, and the rows of this pass go on from "
                "those of the pass before in another order (beam search): decode greedily or by sampling, or freeze "
                "otherwise; freeze anew between passes that have nothing to do with each other"
            )
