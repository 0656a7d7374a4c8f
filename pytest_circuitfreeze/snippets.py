"""A call of a check as a Python program of its own, which needs no pytest."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from collections.abc import Callable, Mapping
from functools import cache
from numbers import Integral

import torch
from torch import Tensor

from freeze_core import InterventionConfig
from pytest_circuitfreeze.layout import WIDTH, Brackets, Code, abridged, laid_out, prefixed
from pytest_circuitfreeze.origins import origin_of
from pytest_circuitfreeze.strategies import Batch

__all__ = ["Call"]

UNKNOWN = "..."
"""Stands in a snippet for what cannot be written as code."""


class Call:
    """A call of a function, written down when it is made: what an engine writes to its arguments does not show.

    Args:
        function: what is called, by its place in a module.
        arguments: by name; those that are the defaults are left out.
    """

    def __init__(self, function: Callable[..., object], arguments: Mapping[str, object]) -> None:
        self._writer = _Writer()
        self._threads = torch.get_num_threads()
        self._values: list[tuple[str, Code, str]] = []
        for name, value in _given(function, arguments).items():
            self._writer.unknown.clear()
            code = self._writer.code(value)
            self._values.append((name, code, ", ".join(self._writer.unknown)))
            if _has_a_line(code):
                self._writer.names[id(value)] = name
        self._call = self._writer.call(function, arguments)

    def lines(self) -> list[str]:
        """Each argument for a person, long lists abridged, indented by two."""
        return [f"  {name}: {text}" for name, text in self.circumstances(indent=2).items()]

    def circumstances(self, indent: int = 0) -> dict[str, str]:
        """Each argument for a person by its name, long lists abridged; of what is unknown its type.

        Args:
            indent: of the lines that they will stand on.
        """
        return {
            name: unknown if code == UNKNOWN else laid_out(abridged(code), indent, len(name) + 2)
            for name, code, unknown in self._values
        }

    @property
    def snippet(self) -> str:
        """The program. What cannot be written as code is `...`, and the line says `# yours` and of which type it is."""
        assignments = [
            laid_out(prefixed(f"{name} = ", code)) + (f"  # yours: {unknown}" if unknown else "")
            for name, code, unknown in self._values
            if _has_a_line(code)
        ]
        threads = f"torch.set_num_threads({self._threads})  # sums are rounded otherwise in more or fewer"
        return "\n".join([*self._writer.imports(), "", threads, *assignments, "", laid_out(self._call), ""])


class _Writer:
    """Writes values as code, and keeps what the code needs.

    Attributes:
        names: variables that hold values, by the values' identity.
        unknown: the types of what could not be written.
    """

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        self.unknown: list[str] = []
        self._imported: dict[str, set[str]] = {}

    def imports(self) -> list[str]:
        """The lines that import torch and what the code uses."""
        own = [_import(module, sorted(names)) for module, names in sorted(self._imported.items())]
        return ["import torch", "", *own]

    def code(self, value: object) -> Code:
        """An expression that gives `value`."""
        if isinstance(value, str):
            return json.dumps(str(value))  # in double quotes; an enum's member is its string
        if value is None or isinstance(value, bool):
            return repr(value)
        if isinstance(value, Integral):
            return repr(int(value))
        if isinstance(value, float):
            return repr(float(value)) if math.isfinite(value) else f'float("{value}")'
        if id(value) in self.names:
            return self.names[id(value)]
        origin = origin_of(value)
        if origin is not None:
            made = self.call(origin.maker, origin.arguments())
            return made if origin.place is None else Brackets(made.start, made.items, f"{made.end}[{origin.place}]")
        return self._built(value)

    def _built(self, value: object) -> Code:
        """An expression for a value that says itself what it consists of."""
        if isinstance(value, list | tuple | range):
            return Brackets("[", tuple(map(self.code, value)), "]")
        if isinstance(value, torch.dtype):
            return repr(value)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, Batch):
            fields = {"input_ids": value.input_ids, "attention_mask": value.attention_mask}
            return self.call(Batch, fields)
        if isinstance(value, InterventionConfig):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return self.call(InterventionConfig, fields, "freeze_core")
        self.unknown.append(type(value).__name__)
        return UNKNOWN

    def call(self, function: Callable[..., object], arguments: Mapping[str, object], module: str = "") -> Brackets:
        """A call of what `module` holds, by default the function's own; optional arguments are named."""
        self._imported.setdefault(module or function.__module__, set()).add(function.__name__)
        required = [name for name, default in _defaults(function).items() if default is inspect.Parameter.empty]
        items = [
            prefixed("" if name in required else f"{name}=", self.code(value))
            for name, value in _given(function, arguments).items()
        ]
        return Brackets(f"{function.__name__}(", tuple(items), ")")

    def _tensor(self, tensor: Tensor) -> Code:
        items = [self.code(tensor.tolist())]
        if tensor.dtype != torch.int64:
            items.append(f"dtype={tensor.dtype}")
        if tensor.device.type != "cpu":
            items.append(f'device="{tensor.device}"')
        return Brackets("torch.tensor(", tuple(items), ")")


def _has_a_line(code: Code) -> bool:
    """Whether an argument gets a name of its own; plain values, and what has a name, stand in the call."""
    return isinstance(code, Brackets) or code == UNKNOWN


def _import(module: str, names: list[str]) -> str:
    line = f"from {module} import {', '.join(names)}"
    return line if len(line) <= WIDTH else laid_out(Brackets(f"from {module} import (", tuple(names), ")"))


def _given(function: Callable[..., object], arguments: Mapping[str, object]) -> dict[str, object]:
    """The arguments that are not the defaults, in the order of the parameters."""
    known = {name: default for name, default in _defaults(function).items() if name in arguments}
    return {name: arguments[name] for name, default in known.items() if not _is_default(arguments[name], default)}


@cache
def _defaults(function: Callable[..., object]) -> dict[str, object]:
    """Each parameter's default, `Parameter.empty` where it has none."""
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


def _is_default(value: object, default: object) -> bool:
    """Only plain values are compared, since not everything can be."""
    return value is default or (isinstance(value, str | int | float) and value == default)
