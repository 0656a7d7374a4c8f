"""`--circuitfreeze-list`: what there is to choose from. Nothing is imported to find it out, no torch above all."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from textwrap import fill

from pytest_circuitfreeze.architectures import model_types
from pytest_circuitfreeze.collect import ROOT, suite_files
from pytest_circuitfreeze.engines import BUILT_IN, EXTRAS, entry_point_engines
from pytest_circuitfreeze.matrix import subject
from pytest_circuitfreeze.models import TINY

WIDTH = 100


def listing() -> str:
    """Architectures, claims and engines, for a terminal."""
    return "\n".join([*_architectures(), "", *_claims(), "", *_engines()])


def _architectures() -> Iterator[str]:
    types = [name for name in model_types() if name not in TINY]
    yield "architectures (--circuitfreeze-arch): built in"
    yield _folded(", ".join(TINY))
    yield f"and {len(types)} causal language model types of transformers {_version('transformers')}"
    yield _folded(", ".join(types))


def _claims() -> Iterator[str]:
    yield f"claims (pytest --circuitfreeze {ROOT}/<file>::test_<claim>, or -k <claim>)"
    for path in suite_files(bench=False):
        yield f"  {subject(f'{ROOT}/{path.name}')}: {path.name}"
        for name, sentence in claims_of(path):
            yield fill(f"{name}: {sentence}", WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 6)


def claims_of(path: Path) -> list[tuple[str, str]]:
    """The name and the sentence of each claim in a file of tests."""
    tests = [
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    return [(test.name.removeprefix("test_"), (ast.get_docstring(test) or test.name).splitlines()[0]) for test in tests]


def _engines() -> Iterator[str]:
    yield "engines (--circuitfreeze-engine): built in"
    for name in BUILT_IN:
        extra = EXTRAS.get(name)
        yield f"  {name}" + (f": {extra} {_version(extra)}" if extra else "")
    others = entry_point_engines()
    yield "and those of installed packages" + ("" if others else ": none")
    yield from (f"  {entry.name}: {entry.value}" for entry in others)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return f"is not installed (pip install 'pytest-circuitfreeze[{package}]')"


def _folded(text: str) -> str:
    return fill(text, WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
