"""Whether all that a model runs is code whose passes can share work.

A sweep shares work between passes where its clean pass shows that they have it in common. What is seen in one pass
holds for all others where code treats all values alike, as that of torch and transformers does. A hook, a forward or a
class from elsewhere may write to what was kept (through `.data`, say, which torch does not count), keep something from
one pass for the next, or mix rows for some values only, and no pass over other values shows that. Where there is such
code, each pass of a sweep is a whole one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import lru_cache, partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

__all__ = ["foreign_code"]

PACKAGES = ("torch", "transformers", "peft", "accelerate", "torchao", "bitsandbytes", "freeze_core")
"""Those whose modules, hooks and functions are known."""

PYTHON = ("builtins", "abc", "typing", "collections", "functools")
"""What classes of theirs are derived from."""


def foreign_code(model: nn.Module) -> str | None:
    """What may run in a forward pass of `model` and is of no known package, the first of it; `None` if there is none.

    Patches of functions that modules call by their names are not seen.
    """
    return next(_foreign(model), None)


def _foreign(model: nn.Module) -> Iterator[str]:
    for mode in (*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()):
        if not _is_known_class(type(mode)):
            yield f"the mode {type(mode).__qualname__}"
    for hook in (*torch_module._global_forward_hooks.values(), *torch_module._global_forward_pre_hooks.values()):
        if not _is_known(hook):
            yield f"the global hook {hook!r}"
    for name, module in model.named_modules():
        where = name or "the model"
        if not _is_known_class(type(module)) or not _is_known(type(module).forward):
            yield f"the class {type(module).__qualname__} of {where}"
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if not _is_known(hook):
                yield f"a hook on {where}"
        for attribute, value in vars(module).items():
            if isinstance(value, FunctionType | MethodType | partial) and not _is_known(value):
                yield f"{attribute} of {where}"
        for attribute, parameter in module._parameters.items():
            if parameter is not None and not _is_known_class(type(parameter)):
                yield f"the class {type(parameter).__qualname__} of {attribute} of {where}"
    attention = _attention_function(model)
    if attention is not None and not _is_known(attention):
        yield f"the attention implementation {attention!r}"


def _attention_function(model: nn.Module) -> Any:
    """The function that a transformers model's attention is formed by, where it was registered."""
    transformers = sys.modules.get("transformers")
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return None if transformers is None else transformers.AttentionInterface().get(name)


def _is_known(function: Any) -> bool:
    while isinstance(function, partial | torch_module._WrappedHook):
        function = function.func if isinstance(function, partial) else function.hook
    if isinstance(function, BuiltinFunctionType):
        return True
    owner = getattr(function, "__self__", None)
    if owner is not None and not _is_known_class(type(owner)):
        return False
    return _package(getattr(function, "__module__", None) or type(function).__module__) in PACKAGES


def _is_known_class(cls: Any) -> bool:
    return _has_known_bases(cls)


@lru_cache(maxsize=1024)
def _has_known_bases(cls: type) -> bool:
    bases = {_package(base.__module__) for base in cls.__mro__}
    return bool(bases & set(PACKAGES)) and bases <= {*PACKAGES, *PYTHON}


def _package(module: str) -> str:
    return module.partition(".")[0]
