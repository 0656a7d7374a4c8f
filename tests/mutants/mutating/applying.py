"""Puts a mutant in place of the code that is running already, wherever its function is held."""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import CodeType, FunctionType

from mutating.making import Mutant

Key = tuple[str, str, int]
"""A function's module, its qualified name and its first line, which a mutant leaves where they are."""


def live_functions(package: str) -> Mapping[Key, Sequence[FunctionType]]:
    """All functions of the package that exist now: methods too, and what decorators have wrapped."""
    found: dict[Key, list[FunctionType]] = defaultdict(list)
    for function in gc.get_objects():
        if type(function) is FunctionType and f"{function.__module__}.".startswith(f"{package}."):
            found[_key(function.__module__, function.__code__)].append(function)
    return found


def apply(mutant: Mutant, path: Path, live: Mapping[Key, Sequence[FunctionType]]) -> bool:
    """Gives the functions of the mutant's module, which is in the file `path`, the mutant's code.

    Nothing else is exchanged, so that classes and modules stay the ones that tests and other modules have imported.
    False where the text does not compile, as some of mutmut's do not, or where no such function is alive.
    """
    try:
        changed = compile(mutant.source(path.read_bytes()), str(path), "exec", dont_inherit=True)
    except SyntaxError:
        return False
    applied = False
    for code in _codes(changed):
        for function in live.get(_key(mutant.module, code), ()):
            function.__code__ = code
            scope = code.co_qualname.replace(".<locals>", "")
            applied = applied or f"{mutant.function}.".startswith(f"{scope}.")
    return applied


def _key(module: str, code: CodeType) -> Key:
    return module, code.co_qualname, code.co_firstlineno


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
