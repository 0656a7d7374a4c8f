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
    return next((what for what, code in _code_of(model) if not _is_known(code)), None)


def _code_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """All classes and functions that a pass may run, and what an error calls them."""
    for mode in (*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()):
        yield f"the mode {type(mode).__qualname__}", type(mode)
    for hook in (*torch_module._global_forward_hooks.values(), *torch_module._global_forward_pre_hooks.values()):
        yield f"the global hook {hook!r}", hook
    for name, module in model.named_modules():
        where = name or "the model"
        yield f"the class {type(module).__qualname__} of {where}", type(module)
        yield f"the forward of the class {type(module).__qualname__} of {where}", type(module).forward
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            yield f"a hook on {where}", hook
        for attribute, value in vars(module).items():
            if isinstance(value, FunctionType | MethodType | partial):
                yield f"{attribute} of {where}", value
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                yield f"the class {type(parameter).__qualname__} of {attribute} of {where}", type(parameter)
    # The function that computes the attention of a transformers model, where it was registered.
    transformers = sys.modules.get("transformers")
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    attention = transformers.AttentionInterface().get(name) if transformers else None
    if attention is not None:
        yield f"the attention implementation {attention!r}", attention


def _is_known(code: Any) -> bool:
    while isinstance(code, partial | torch_module._WrappedHook):
        code = code.func if isinstance(code, partial) else code.hook
    if isinstance(code, type):
        return _has_known_bases(code)
    if isinstance(code, BuiltinFunctionType):
        return True
    owner = getattr(code, "__self__", None)
    owner_class: type = type(owner)
    if owner is not None and not _has_known_bases(owner_class):
        return False
    return _package(getattr(code, "__module__", None) or type(code).__module__) in PACKAGES


@lru_cache(maxsize=1024)
def _has_known_bases(cls: type) -> bool:
    bases = {_package(base.__module__) for base in cls.__mro__}
    return bool(bases & set(PACKAGES)) and bases <= {*PACKAGES, *PYTHON}


def _package(module: str) -> str:
    return module.partition(".")[0]
