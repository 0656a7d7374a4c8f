"""Arguments of a forward pass by name, and which of them is the cache of keys and values.

A cache is recognised by what it is and not by what its argument is called: transformers has called it `past`,
`past_key_values`, `cache_params` and, from 5.24 on, `cache`, and a model of one's own calls it what it likes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from types import MethodType
from typing import Any

from torch import Tensor, nn

from freeze_core.errors import InterventionError, with_newer_versions
from freeze_core.forward_patch import signature_of
from freeze_core.freezing.caches import is_cache

__all__ = ["ForwardArguments", "find_cache", "returned_cache"]


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
"""Parts of the names under which stacks of layers take other tensors, alone or in containers."""


def find_cache(arguments: Mapping[str, Any], model: str) -> Any:
    """The cache among the arguments of a pass by name, or `None`.

    Raises:
        InterventionError: there are several, or keys and values of earlier tokens seem to be in an object that does not
            count its tokens and cannot be marked.
    """
    caches: dict[str, Any] = {}
    for name, value in arguments.items():
        if value is None or isinstance(value, bool | int | float | str):
            continue
        if is_cache(value):
            caches[name] = value
        elif _holds_activations(value) and not any(part in name for part in NOT_A_CACHE):
            raise InterventionError(
                with_newer_versions(
                    f"{model} was given {name}, a {type(value).__name__} of tensors: if it holds keys and values of "
                    "earlier tokens, how many they are and under which freeze they were computed is unknown; pass a "
                    "cache of transformers (DynamicCache), or run without one"
                )
            )
    if len({id(cache) for cache in caches.values()}) > 1:
        raise InterventionError(
            f"{model} was given {len(caches)} caches ({', '.join(caches)}): which of them holds the tokens before this "
            "pass is unknown; pass one"
        )
    return next(iter(caches.values()), None)


def returned_cache(output: Any) -> Any:
    """The cache among what a pass returned (a tuple, a dict, an object with attributes), or `None`."""
    if not isinstance(output, tuple | list):
        # A ModelOutput is a mapping: to ask it for an attribute of an older name would give a deprecation warning.
        output = (output if isinstance(output, Mapping) else getattr(output, "__dict__", {})).values()
    return next((value for value in output if is_cache(value)), None)


def _holds_activations(value: Any) -> bool:
    """Whether a value has the form of keys and values: one large floating tensor, or smaller ones in a container."""
    if isinstance(value, Tensor):
        return value.is_floating_point() and value.dim() > 3
    return any(tensor.is_floating_point() and tensor.dim() > 2 for tensor in _tensors(value, depth=3))


def _tensors(value: Any, depth: int) -> Iterator[Tensor]:
    """The tensors in nested containers, and in the attributes of objects that are none."""
    if isinstance(value, Tensor):
        yield value
    elif depth and not isinstance(value, str | nn.Module | type):
        if not isinstance(value, list | tuple | Mapping):
            value = getattr(value, "__dict__", {})
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part, depth - 1)
