"""What the class of a module says of it, worked out once a class: a model has many modules of few classes."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache, partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from freeze_core.attention.families import NOT_SOFTMAX
from freeze_core.forward_patch import patches_on

__all__ = [
    "attention_functions",
    "class_functions",
    "class_values",
    "instance_forward",
    "instance_methods",
    "is_called_attention",
    "is_recurrent",
    "names_of",
    "parameters_of",
    "runs_library_code",
]

AROUND = ("accelerate.", "torch.", "transformers.distributed.", "transformers.integrations.")
"""Where functions come from that libraries put around a forward, to move or add up tensors: they change no layout."""

_once = lru_cache(maxsize=1024)  # classes that are made as a program runs are not held for ever


def names_of(module: nn.Module) -> tuple[str, ...]:
    """What the tables may call a module: its classes, by their name alone and with their module's."""
    return _names(type(module).__mro__)


def is_recurrent(module: nn.Module) -> bool:
    """Whether a module is one of those that mix tokens without a pattern."""
    return _is_recurrent(type(module).__mro__)


def is_called_attention(module: nn.Module) -> bool:
    """Whether one of a module's classes has attention in its name."""
    return _is_called_attention(type(module).__mro__)


def parameters_of(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """What the module's `forward` takes."""
    return _parameters(type(module).forward)


@_once
def _names(classes: tuple[type, ...]) -> tuple[str, ...]:
    called = ((one.__name__, f"{one.__module__.rpartition('.')[2]}.{one.__name__}") for one in classes)
    return tuple(name for pair in called for name in pair)


@_once
def _is_recurrent(classes: tuple[type, ...]) -> bool:
    return any(one.__name__ in NOT_SOFTMAX for one in classes)


@_once
def _is_called_attention(classes: tuple[type, ...]) -> bool:
    names = [one.__name__.lower() for one in classes]
    return any("attention" in name or "attn" in name for name in names)


@_once
def _parameters(forward: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(forward).parameters


def runs_library_code(module: nn.Module, checked: dict[type, bool]) -> bool:
    """Whether a module runs nothing but what transformers or torch wrote, so that the tables hold for it.

    The tables of storages describe the code of transformers. A class of the same name, a subclass, remote code, or
    a method, function or attention kernel that somebody has replaced may read the same projections otherwise.

    Args:
        checked: the result for each class that was looked at, kept by the caller for as long as nobody can patch one.
    """
    forward = instance_forward(module)
    if forward is not None and not getattr(forward, "__module__", "").startswith(AROUND):
        return False
    if any(True for _ in instance_methods(module)):
        return False
    cls = type(module)
    if cls not in checked:
        checked[cls] = _is_library_class(cls)
    return checked[cls] and _is_library_kernel(module)


def instance_forward(module: nn.Module) -> Any:
    """What somebody has put in the place of this one module's `forward`, beneath freezes and offloading."""
    patches = patches_on(module)
    if patches:
        forward: Any = patches[0].original
    elif "_hf_hook" in vars(module):  # accelerate moves what the module had to another name
        forward = vars(module).get("_old_forward")
    else:
        forward = vars(module).get("forward")
    if getattr(forward, "__self__", None) is module and getattr(forward, "__func__", None) is type(module).forward:
        return None
    return forward


def instance_methods(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Functions that somebody has put into this one module, in the place of its class's; `forward` is another matter.

    Functions of torch, transformers and accelerate, which they put there themselves, are left out.
    """
    for name, value in vars(module).items():
        is_function = isinstance(value, FunctionType | MethodType) and name not in ("forward", "_old_forward")
        if is_function and value.__module__.partition(".")[0] not in ("torch", "transformers", "accelerate"):
            yield name, value


def class_functions(cls: type) -> Iterator[FunctionType]:
    """The functions that a class of modules has, or inherits from others than torch's own classes."""
    for base in _written_classes(cls):
        yield from (function for function in vars(base).values() if isinstance(function, FunctionType))


def class_values(cls: type) -> Iterator[tuple[str, Any]]:
    """The numbers and texts among the attributes of a class of modules, and of those that it derives from."""
    for base in _written_classes(cls):
        yield from ((name, value) for name, value in vars(base).items() if isinstance(value, bool | int | float | str))


def _written_classes(cls: type) -> list[type]:
    """The class and those that it derives from, without torch's: some of those wrap a class (FSDP's, say)."""
    return [base for base in cls.__mro__ if base is not object and not base.__module__.startswith("torch.")]


def _is_library_class(cls: type) -> bool:
    """Whether a class is the one that transformers has under this name, and its methods are what stands in the file."""
    bases = _written_classes(cls)
    if not bases:
        return True  # torch's own
    for base in bases:
        module = sys.modules.get(base.__module__)
        if not base.__module__.startswith("transformers.") or getattr(module, base.__name__, None) is not base:
            return False
    return _are_library_functions(class_functions(cls))


MODELS = ("transformers.models.", "transformers.integrations.")
"""Where the functions are that form attention; what others of transformers use (logging, say) forms none."""


def _are_library_functions(functions: Iterable[FunctionType]) -> bool:
    """Whether functions stand in files of transformers or torch, as do all that they use, and those use.

    The names that their code uses may be bound to other functions by now, as libraries that speed models up do.
    """
    library = (_library_folder(), _TORCH)
    return all(function.__code__.co_filename.startswith(library) for function in _functions_used(functions))


def _functions_used(functions: Iterable[FunctionType]) -> Iterator[FunctionType]:
    """Functions, and those that their code uses by a name of their file or of a model's, each once."""
    waiting, seen = list(functions), set[FunctionType]()
    files = {id(function.__globals__) for function in waiting}
    while waiting:
        function = _unwrapped(waiting.pop())
        if function in seen:
            continue
        seen.add(function)
        yield function
        if id(function.__globals__) in files or str(function.__globals__.get("__name__")).startswith(MODELS):
            used = (function.__globals__.get(name) for name in function.__code__.co_names)
            waiting += [other for other in used if isinstance(other, FunctionType)]


def attention_functions(module: nn.Module) -> list[Any]:
    """All functions that form the attention of a module: those of its class, its kernel, and what these use."""
    kernel = _kernel(module)
    functions = [*class_functions(type(module)), *([kernel] if isinstance(kernel, FunctionType) else [])]
    return [*_functions_used(functions), kernel]


def _kernel(module: nn.Module) -> Any:
    """The attention function that the module's config names; `None` where that is the class's own."""
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    registered = getattr(sys.modules.get("transformers.modeling_utils"), "ALL_ATTENTION_FUNCTIONS", None)
    kernel = None if registered is None or name not in registered else registered[name]
    while isinstance(kernel, partial):
        kernel = kernel.func
    return kernel


def _is_library_kernel(module: nn.Module) -> bool:
    """Whether the attention function that the module's config names is transformers' own."""
    kernel = _kernel(module)
    return kernel is None or (isinstance(kernel, FunctionType) and _are_library_functions([kernel]))


def _unwrapped(function: FunctionType) -> FunctionType:
    """The function that torch's decorators (`torch.no_grad()`, `torch.compile`) were put around."""
    inner: Any = function
    while isinstance(inner, FunctionType) and inner.__code__.co_filename.startswith(_TORCH):
        wrapped = getattr(inner, "_torchdynamo_orig_callable", None) or getattr(inner, "__wrapped__", None)
        if wrapped is None:
            break
        inner = wrapped
    return inner if isinstance(inner, FunctionType) else function


def _library_folder() -> str:
    library = sys.modules.get("transformers")
    return f"{os.path.dirname(library.__file__ or '')}{os.sep}" if library else "transformers is not loaded"


_TORCH = f"{os.path.dirname(torch.__file__)}{os.sep}"
