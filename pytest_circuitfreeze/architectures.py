"""The names of tiny architectures: the built-in ones, and every causal language model type of transformers."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from pytest_circuitfreeze.models import TINY

_TABLE = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"


@dataclass(frozen=True)
class Unbuilt:
    """Stands for a tiny model that cannot be built here; `reason` says why."""

    reason: str


@cache
def model_types() -> tuple[str, ...]:
    """The causal language model types of the installed transformers, sorted; nothing is imported.

    Importing transformers' own table takes torch and seconds, and options are read in every run.
    """
    found = find_spec("transformers")
    if found is None or found.origin is None:
        return ()
    source = Path(found.origin).parent / "models" / "auto" / "modeling_auto.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and _TABLE in [ast.unparse(target) for target in node.targets]:
            pairs = next(part for part in ast.walk(node.value) if isinstance(part, ast.List))
            return tuple(sorted({ast.literal_eval(pair)[0] for pair in pairs.elts}))
    return ()


@cache
def every_architecture() -> tuple[str, ...]:
    """The built-in tiny architectures, then the types that none of them is called like."""
    return (*TINY, *(name for name in model_types() if name not in TINY))
