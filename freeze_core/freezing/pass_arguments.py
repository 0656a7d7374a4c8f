"""Arguments of a forward pass by name, and which of them is the cache of keys and values.

A cache is recognised by what it is and not by what its argument is called: transformers has called it `past`,
`past_key_values`, `cache_params` and, from 5.24 on, `cache`, and a model of one's own calls it what it likes.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from freeze_core.errors import InterventionError, with_newer_versions
from freeze_core.forward_patch import signature_of
from freeze_core.freezing.caches import is_cache

__all__ = ["ForwardArguments", "caches_in", "find_cache", "holds_tensors", "returned_cache"]


class ForwardArguments:
    """Binds the arguments of a call to the names of a forward's parameters.

    Args:
        module: the module that is called.
        forward: what the module ran before it was patched.
    """

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        parameters = signature_of(forward).parameters
        # A wrapper put on the instance (a timer, a logger) passes on what the class's own forward takes.
        if any(one.kind is inspect.Parameter.VAR_POSITIONAL for one in parameters.values()):
            parameters = signature_of(MethodType(type(module).forward, module)).parameters
        self._names = [
            name
            for name, one in parameters.items()
            if one.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        ]

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The arguments of a call by name; a positional one without a known name is called by its number."""
        if not args:
            return kwargs
        unnamed = (f"argument {number}" for number in range(len(self._names), len(args)))
        return {**dict(zip([*self._names, *unnamed], args, strict=False)), **kwargs}

    def takes(self, name: str) -> bool:
        """Whether the forward has a parameter of that name."""
        return name in self._names


NOT_A_CACHE = (
    "audio",
    "bias",
    "embed",
    "encoder",
    "feature",
    "hidden",
    "image",
    "input",
    "mask",
    "pixel",
    "position",
    "video",
)
"""Parts of the names under which stacks of layers take other tensors, alone or in containers.

A cache is found in such a container as well: only its tensors are not taken for one.
"""


def find_cache(arguments: Mapping[str, Any], model: str) -> Any:
    """The cache among the arguments of a pass by name, alone or in a container, or `None`.

    Raises:
        InterventionError: there are several, or keys and values of earlier tokens seem to be in an object that does not
            count its tokens and cannot be marked.
    """
    caches: dict[str, Any] = {}
    for name, value in arguments.items():
        if value is None or isinstance(value, bool | int | float | str):
            continue
        contained = list(caches_in(value))
        caches.update({name if cache is value else f"{name} ({type(value).__name__})": cache for cache in contained})
        if len({id(cache) for cache in (*contained, *caches.values())}) > 1:
            raise InterventionError(
                f"{model} was given several caches ({', '.join(caches)}): which of them holds the tokens before this "
                "pass is unknown; pass one"
            )
        if not contained and not any(part in name for part in NOT_A_CACHE) and _holds_activations(value):
            raise InterventionError(
                with_newer_versions(
                    f"{model} was given {name}, a {type(value).__name__} of tensors: if it holds keys and values of "
                    "earlier tokens, how many they are and under which freeze they were computed is unknown; pass a "
                    "cache of transformers (DynamicCache), or run without one"
                )
            )
    return next(iter(caches.values()), None)


def returned_cache(output: Any) -> Any:
    """The cache among what a pass returned (a tuple, a dict, an object with attributes), or `None`."""
    return next(caches_in(output), None)


def caches_in(value: Any) -> Iterator[Any]:
    """The caches that a value is or contains."""
    return (part for part in _parts(value) if is_cache(part))


def holds_tensors(cache: Any) -> bool:
    """Whether a cache has tensors that can be keys and values, whatever it says of its length."""
    return any(map(_may_be_cached, _parts(cache, into_caches=True)))


def _holds_activations(value: Any) -> bool:
    """Whether a value has the form of keys and values: one large floating tensor, or smaller ones in a container."""
    if isinstance(value, Tensor):
        return value.is_floating_point() and value.dim() > 3
    return any(_may_be_cached(part) for part in _parts(value))


def _may_be_cached(part: Any) -> bool:
    """Whether a part of a container can be keys or values: a tensor of floats, or of what they were rounded to."""
    if not isinstance(part, Tensor) or part.dim() < 3 or not part.numel():
        return False
    return part.is_floating_point() or part.dtype in (torch.int8, torch.uint8)


DEPTH = 8
"""How deep containers are looked into: a cache of layers of pairs in an object that carries state has five."""


def _parts(value: Any, depth: int = DEPTH, seen: set[int] | None = None, into_caches: bool = False) -> Iterator[Any]:
    """The tensors and caches that a value is or contains, in containers and in attributes of objects.

    Args:
        into_caches: whether caches are looked into, whose layers count tokens as well, and not given themselves.
    """
    if isinstance(value, Tensor) or (is_cache(value) and not into_caches):
        yield value
        return
    seen = set() if seen is None else seen
    if depth and id(value) not in seen:
        seen.add(id(value))
        for part in _children(value):
            if part is not None and not isinstance(part, bool | int | float | str):
                yield from _parts(part, depth - 1, seen, into_caches)


def _children(value: Any) -> Iterator[Any]:
    """The items of a container; of a module its buffers, and of any object its attributes, also those in slots."""
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset | deque):
        yield from value
    elif isinstance(value, nn.Module):
        yield from value.buffers()
        yield from (part for name, part in vars(value).items() if not name.startswith("_"))
    elif not isinstance(value, type | FunctionType | MethodType | ModuleType):
        yield from getattr(value, "__dict__", {}).values()
        for cls in type(value).__mro__:
            slots = vars(cls).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                yield getattr(value, name, None)
