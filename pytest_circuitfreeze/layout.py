"""Python code as a tree that is laid out in lines: brackets are opened where a line would get too long."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["WIDTH", "Brackets", "Code", "abridged", "laid_out", "prefixed"]

WIDTH = 79
GLANCE = 12
"""Numbers that a list is shown whole with, where code is abridged."""


@dataclass(frozen=True)
class Brackets:
    """A call or a list: what it begins with, the opening bracket included, its items, and what it ends with."""

    start: str
    items: tuple[Code, ...]
    end: str


Code: TypeAlias = str | Brackets


def prefixed(start: str, code: Code) -> Code:
    """`code` with something before it, such as `name=`."""
    return start + code if isinstance(code, str) else Brackets(start + code.start, code.items, code.end)


def abridged(code: Code) -> Code:
    """`code` for a glance: of a list of more than `GLANCE` numbers the first ones, of rows of them the first row."""
    if isinstance(code, str):
        return code
    if _numbers(code) <= GLANCE:
        return Brackets(code.start, tuple(map(abridged, code.items)), code.end)
    shown = code.items[: GLANCE // 2] if isinstance(code.items[0], str) else (abridged(code.items[0]),)
    return Brackets(code.start, shown if len(shown) == len(code.items) else (*shown, "..."), code.end)


def _numbers(code: Code) -> int:
    """How many numbers stand in a list, or in a list of such lists; 0 for anything else."""
    if isinstance(code, str):
        return 1
    parts = [_numbers(item) for item in code.items]
    return sum(parts) if code.start == "[" and all(parts) else 0


def laid_out(code: Code, indent: int = 0, used: int = 0) -> str:
    """`code` as text, in lines of at most `WIDTH` characters as far as names and plain values allow.

    Args:
        indent: of the line that it begins on; what is inside brackets is indented by four more.
        used: characters that stand on its last line besides.
    """
    flat = _flat(code)
    if isinstance(code, str) or indent + len(flat) + used <= WIDTH:
        return flat
    if len(code.items) == 1 and isinstance(code.items[0], Brackets):  # one pair of lines for both brackets
        item = code.items[0]
        return laid_out(Brackets(code.start + item.start, item.items, item.end + code.end), indent, used)
    inner, outer = " " * (indent + 4), " " * indent
    if code.start.endswith("[") and all(isinstance(item, str) for item in code.items):  # numbers, many to a line
        numbers = ", ".join(map(_flat, code.items)) + ","
        body = textwrap.fill(numbers, WIDTH, initial_indent=inner, subsequent_indent=inner)
    else:
        body = "\n".join(f"{inner}{laid_out(item, indent + 4, used=1)}," for item in code.items)
    return f"{code.start}\n{body}\n{outer}{code.end}"


def _flat(code: Code) -> str:
    return code if isinstance(code, str) else code.start + ", ".join(map(_flat, code.items)) + code.end
