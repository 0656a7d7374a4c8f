"""Remembers how a value was made, so that a failure can show the code that makes it again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar
from weakref import finalize, ref

__all__ = ["Origin", "origin_of", "remembered", "stands_for"]

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Origin:
    """The call that made a value.

    Args:
        maker: the function that was called.
        given: its arguments, by name.
        model: the argument of that name, if it had one. Held weakly: models keep some of what is made of them.
        place: where `maker` gave a list, the value's place in it.
    """

    maker: Callable[..., object]
    given: Mapping[str, object]
    model: ref[object] | None = None
    place: int | None = None

    def arguments(self) -> dict[str, object]:
        """All arguments, by name."""
        if self.model is None:
            return dict(self.given)
        model = self.model()
        return {"model": Gone() if model is None else model, **self.given}


class Gone:
    """Stands for a model that is no more."""


# By identity: a recording compares by what is in it, and an engine may compare as it likes.
_ORIGINS: dict[int, Origin] = {}


def remembered(maker: Callable[P, T]) -> Callable[P, T]:
    """Remembers of all that `maker` gives, or of each value of a list that it gives, the call that gave it last.

    So a factory's call counts, and not those that it makes itself. What cannot be weakly referenced is not remembered.
    """
    signature = inspect.signature(maker)

    @wraps(maker)
    def made(*args: P.args, **kwargs: P.kwargs) -> T:
        value = maker(*args, **kwargs)
        given = dict(signature.bind(*args, **kwargs).arguments)
        model = ref(given.pop("model")) if "model" in given else None
        if isinstance(value, list):
            for place, one in enumerate(value):
                _remember(one, Origin(maker, given, model, place))
        else:
            _remember(value, Origin(maker, given, model))
        return value

    return made


def stands_for(wrapper: object, value: object) -> None:
    """Gives `wrapper` the origin of `value`, if that is known: what it adds is of no interest to who makes it again."""
    origin = origin_of(value)
    if origin is not None:
        _remember(wrapper, origin)


def origin_of(value: object) -> Origin | None:
    """How `value` was made, if it is remembered."""
    return _ORIGINS.get(id(value))


def _remember(value: object, origin: Origin) -> None:
    if id(value) not in _ORIGINS:
        try:
            finalize(value, _ORIGINS.pop, id(value)).atexit = False
        except TypeError:  # it has no place for a weak reference
            return
    _ORIGINS[id(value)] = origin
