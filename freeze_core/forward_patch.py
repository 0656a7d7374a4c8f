"""How code gets into a running model: an instance's `forward` is replaced by a bound method, and put back.

Unlike a forward hook, a replaced `forward` also takes effect in a model that was compiled before, costs one
Python call, and is seen by every hook that others register on the module.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType
from typing import Any, NoReturn, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from freeze_core.errors import CircuitFreezeError, InterventionError

__all__ = ["ForwardPatch", "PassPatch", "patch_on", "patches_on", "signature_of"]

SLOTS = ("forward", "_old_forward")
"""What a module runs, and what accelerate's hooks (offloading, device maps) run once they have taken the first."""

PATCHES = "__getstate__"
"""The instance attribute that holds a module's patches.

`copy` and `pickle` call the attribute of this name before they read the state of an object. A shallow copy would share
the patch without calling anything else of it, so this is the only place where it can be refused.
"""

Patch = TypeVar("Patch", bound="ForwardPatch")


class Patches(list["ForwardPatch"]):
    """The patches of one module, in the order in which they were attached; refuses to have the module copied."""

    def __call__(self) -> NoReturn:
        raise CircuitFreezeError(
            f"a frozen {type(self[0].module).__name__} cannot be copied or pickled: remove the freeze first"
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self()


class _State:
    """Whether the method that an `attach` has put into a module is in use; each `attach` makes another one."""

    attached = True


class ForwardPatch:
    """Stands in for `module.forward` between `attach` and `detach`.

    `attach` puts a method into the instance's `__dict__`, bound to the module as its own forward is, and made of a
    function that nothing else has. So three questions have certain answers. In force is what is this method. The freeze
    was thrown out where the module has the forward again that it had before, or its class's. Anything else was put on
    top, and may run the method. A copy of the module that kept the function is told by the module that the function is
    called with. And whoever keeps the method beyond `detach` gets what was beneath it.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._variables = vars(module)
        self._below: Callable[..., Any] | None = self._variables.get("forward")
        self._class_function, self._class_forward = type(module).forward, _class_forward(module)
        self._method: MethodType | None = None
        self._state = _State()

    @property
    def original(self) -> Callable[..., Any]:
        """What it stands in for: the forward that the instance had, or its class's, whatever that is by now."""
        if self._below is not None:
            return self._below
        now = type(self.module).forward
        if now is self._class_function:
            own: Callable[..., Any] = self._class_forward
            return own
        # Somebody has patched the class meanwhile, or has taken such a patch off. A compiled pass cannot make a method.
        return partial(now, self.module) if isinstance(now, FunctionType) else _class_forward(self.module)

    @contextmanager
    def running(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Runs `forward` in the place of `original`."""
        below, self._below = self._below, forward
        try:
            yield
        finally:
            self._below = below

    @property
    def label(self) -> str:
        """What messages call the module."""
        return f"a frozen {type(self.module).__name__}"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What runs in place of the module's own forward."""
        raise NotImplementedError

    def attach(self) -> None:
        """Puts this object in the place of the module's forward, whatever that is by now."""
        self._below = self._variables.get("forward")
        self._class_function, self._class_forward = type(self.module).forward, _class_forward(self.module)
        self._state = _State()
        self._method = MethodType(self._function(), self.module)
        self._variables["forward"] = self._method
        patches = patches_on(self.module)
        patches.append(self)
        self._variables[PATCHES] = patches

    def _function(self) -> FunctionType:
        """The function of the method that is put in the place of the module's forward."""
        state, below, own = self._state, self._below, self._class_forward

        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if state.attached:
                if module is self.module:
                    return self.forward(*args, **kwargs)
                raise CircuitFreezeError(
                    f"this {type(module).__name__} is a copy of a frozen one, whose forward it has: remove the "
                    "freeze, or copy the model before it is frozen"
                )
            if below is not None:
                return below(*args, **kwargs)
            return (own if module is self.module else _class_forward(module))(*args, **kwargs)

        assert isinstance(forward, FunctionType)
        return forward

    def _is_method(self, value: object) -> bool:
        """Whether `value` is what `attach` has put in, or the same method made anew, as accelerate does."""
        return self._method is not None and _same(value, self._method)

    def slot(self) -> str | None:
        """The attribute of the module in which this object is, `None` if it is not in force."""
        return next((name for name in SLOTS if self._is_method(self._variables.get(name))), None)

    def in_force(self) -> bool:
        """Whether the module runs this object, itself or by another patch of ours or a hook of accelerate's."""
        return self.slot() is not None or any(self._is_method(other._below) for other in patches_on(self.module))

    def lost(self) -> bool:
        """Whether something else has put back what the module ran before (an offloading undone, say)."""
        if self._method is not None and self._variables.get("forward") is self._method:
            return False
        if self.in_force():
            return False
        present, formers = self._present(), (self._below, self._class_forward, _class_forward(self.module))
        return present is None or any(_same(present, former) for former in formers)

    def _present(self) -> Any:
        """The forward of the instance, beneath a hook of accelerate's; `None` is the class's."""
        present = self._variables.get("forward")
        if isinstance(present, partial) and getattr(present.func, "__module__", "") == "accelerate.hooks":
            return self._variables.get("_old_forward")
        return present

    def refuse_if_covered(self) -> None:
        """Raises `CircuitFreezeError` if something else was put on top, which may run this object once it is gone."""
        if not self.in_force() and not self.lost():
            raise CircuitFreezeError(
                f"the forward of {self.label} was replaced again, by {_described(self._present())}, so that the freeze "
                "beneath it can be neither changed nor removed: put back the forward that was there before, or delete "
                "it (del module.forward) and set yours again later, then remove the freeze"
            )

    def detach(self) -> None:
        """Puts back what was there, and leaves no trace on the module; where this object is lost, that is done."""
        patches = patches_on(self.module)
        if self not in patches:
            return
        for name in SLOTS:
            if not self._is_method(self._variables.get(name)):
                continue
            if name == "forward" and self._below is None:
                del self._variables[name]
            else:
                self._variables[name] = self.original
        for other in patches:
            if self._is_method(other._below):
                other._below = self._below
        self._state.attached = False
        self._method = None
        patches.remove(self)
        if not patches:
            del self._variables[PATCHES]

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        # A copied model would run this object, which is bound to the original one.
        raise CircuitFreezeError(
            f"a frozen {type(self.module).__name__} cannot be copied or pickled: remove the freeze first"
        )


class PassPatch(ForwardPatch):
    """Stands in for the forward of a module that takes whole passes, one at a time, and looks like it from outside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._busy = threading.Lock()

    def _function(self) -> FunctionType:
        """Has the signature of the module's own forward: generation, say, asks for a model's arguments."""
        function = super()._function()
        shown = signature_of(self.original)
        owner = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        # inspect reads it; the type checker knows no such attribute of a function.
        function.__signature__ = shown.replace(parameters=[owner, *shown.parameters.values()])  # type: ignore[attr-defined]
        return function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs a pass.

        Raises:
            InterventionError: one is running already.
        """
        if torch.compiler.is_compiling():
            return self.run(args, kwargs)
        if not self._busy.acquire(blocking=False):
            raise InterventionError(
                f"a frozen {type(self.module).__name__} is running already, in another thread or from within "
                "itself: run a frozen model one pass at a time"
            )
        try:
            return self.run(args, kwargs)
        finally:
            self._busy.release()

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a pass, the only one for now."""
        raise NotImplementedError


def patches_on(module: nn.Module) -> Patches:
    """The patches of ours on `module`, whatever others have put on top of them; to be added to where there are none."""
    patches = vars(module).get(PATCHES)
    # A copy that was made of the module's attributes has those of the module itself.
    return patches if isinstance(patches, Patches) and patches[0].module is module else Patches()


def patch_on(module: nn.Module, kind: type[Patch]) -> Patch | None:
    """The patch of this kind on `module`, the last one that was attached, beneath whatever others have put on top."""
    return next((patch for patch in reversed(patches_on(module)) if isinstance(patch, kind)), None)


def _class_forward(module: nn.Module) -> Any:
    """What `module.forward` would be if the instance had none of its own."""
    forward: Any = type(module).forward
    if isinstance(forward, FunctionType):
        return MethodType(forward, module)
    return forward.__get__(module) if hasattr(forward, "__get__") else forward


def _described(forward: Any) -> str:
    """What a forward is and where it was written: the name of a wrapper is often that of what it wraps."""
    function = forward.func if isinstance(forward, partial) else getattr(forward, "__func__", forward)
    code = getattr(function, "__code__", None)
    return f"{code.co_qualname} ({code.co_filename}:{code.co_firstlineno})" if code else f"a {type(forward).__name__}"


def _same(value: object, other: object) -> bool:
    """Whether two forwards are one: methods are made anew whenever they are asked for."""
    return value is other or (isinstance(value, MethodType) and isinstance(other, MethodType) and value == other)


_SIGNATURES: WeakKeyDictionary[Callable[..., Any], inspect.Signature] = WeakKeyDictionary()
"""Of bound methods, by their functions: the methods themselves would keep their modules alive."""


def signature_of(forward: Callable[..., Any]) -> inspect.Signature:
    """The signature of a forward as it is called, without the module that it is bound to."""
    function = getattr(forward, "__func__", None)
    if not isinstance(function, FunctionType):
        return inspect.signature(forward)
    if function not in _SIGNATURES:
        _SIGNATURES[function] = inspect.signature(forward)
    return _SIGNATURES[function]
