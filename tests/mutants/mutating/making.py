"""Mutants of a package: mutmut's operators on what runs inside functions, each mutant as the text of its module.

mutmut itself calls mutated functions through wrappers, under which `torch.compile` compiles something else than the
functions that are tested, and leaves decorated functions (properties among them) alone.
"""

from __future__ import annotations

import hashlib
import tokenize
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import libcst as cst
from libcst.metadata import ByteSpanPositionProvider, MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

UNTOUCHED_CALLS = {"len", "isinstance", "cast"}
"""As in mutmut, a check of types is not mutated; and the first argument of `cast` is an annotation."""

AT_IMPORT = {"_multi_head"}
"""Functions that only run while their module is imported, where a mutant comes too late; they make the tables."""


@dataclass(frozen=True)
class Mutant:
    """One change: in `function` of `module`, at `line`, the text `before` became `after`; `start` is its first byte.

    `is_text`: what is changed is only read by people, as the words of an error are.
    """

    module: str
    function: str
    line: int
    start: int
    before: str
    after: str
    code: str
    occurrence: int
    is_text: bool

    @property
    def name(self) -> str:
        """The same as long as the changed line of code is, wherever it moves in its function."""
        spelled = "\0".join((self.module, self.function, self.code, self.before, self.after, str(self.occurrence)))
        return hashlib.sha256(spelled.encode()).hexdigest()[:12]

    def source(self, original: bytes) -> str:
        """The module's text with the change in it."""
        end = self.start + len(self.before.encode())
        return (original[: self.start] + self.after.encode() + original[end:]).decode()


def mutants_of(package: Path) -> list[Mutant]:
    """All mutants of the package in this folder, by their names: an order that has nothing to do with the code.

    The first n of them are thus a random sample, and stay one while the code changes.
    """
    found = {
        mutant.name: mutant
        for path in sorted(package.rglob("*.py"))
        for mutant in _mutants(".".join(path.relative_to(package.parent).with_suffix("").parts), path.read_bytes())
    }
    return [found[name] for name in sorted(found)]


def source_of(package: Path, module: str) -> Path:
    """The file of a module of the package in this folder."""
    return package.parent.joinpath(*module.split(".")).with_suffix(".py")


def _mutants(module: str, source: bytes) -> list[Mutant]:
    visitor = _Visitor(module, source)
    MetadataWrapper(cst.parse_module(source)).visit(visitor)
    return visitor.mutants


class _Visitor(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (ByteSpanPositionProvider, PositionProvider)

    def __init__(self, module: str, source: bytes) -> None:
        super().__init__()
        self.mutants: list[Mutant] = []
        self._module = module
        self._source = source
        self._lines = _code_lines(source)
        self._scopes: list[str] = []
        self._functions = 0
        self._texts = 0
        self._seen: dict[tuple[str, ...], int] = {}

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.Annotation | cst.Decorator | cst.Parameters) or _is_untouched_call(node):
            return False
        self._texts += _is_for_people(node)
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self._scopes.append(node.name.value)
            self._functions += isinstance(node, cst.FunctionDef)
        if self._functions:
            self._add(node)
        return not (isinstance(node, cst.FunctionDef) and node.name.value in AT_IMPORT)

    def on_leave(self, original_node: cst.CSTNode) -> None:
        self._texts -= _is_for_people(original_node)
        if isinstance(original_node, cst.FunctionDef | cst.ClassDef):
            self._scopes.pop()
            self._functions -= isinstance(original_node, cst.FunctionDef)

    def _add(self, node: cst.CSTNode) -> None:
        for kind, operator in mutation_operators:
            if not isinstance(node, kind):
                continue
            span = self.get_metadata(ByteSpanPositionProvider, node)
            before = self._source[span.start : span.start + span.length].decode()
            line = self.get_metadata(PositionProvider, node).start.line
            for changed in operator(node):
                after = cst.Module([]).code_for_node(changed)
                key = (".".join(self._scopes), self._lines[line - 1].strip(), before, after)
                self._seen[key] = self._seen.get(key, -1) + 1
                self.mutants.append(
                    Mutant(
                        module=self._module,
                        function=key[0],
                        line=line,
                        start=span.start,
                        before=before,
                        after=after,
                        code=key[1],
                        occurrence=self._seen[key],
                        is_text=self._texts > 0,
                    )
                )


def _code_lines(source: bytes) -> list[str]:
    """The lines without their comments: a reason beside a line makes no other mutants of it."""
    lines = source.decode().splitlines()
    for token in tokenize.tokenize(BytesIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return lines


def _is_untouched_call(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.Call) and isinstance(node.func, cst.Name) and node.func.value in UNTOUCHED_CALLS


def _is_for_people(node: cst.CSTNode) -> bool:
    """The words of an error or a warning; any text with a space in it, since no name of an attribute has one."""
    if isinstance(node, cst.SimpleString):
        return " " in node.value
    if isinstance(node, cst.Call):
        return cst.Module([]).code_for_node(node.func) == "warnings.warn"
    return isinstance(node, cst.Raise)
