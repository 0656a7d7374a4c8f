"""What `module:attribute` names: something of an installed package, or of a file in the current folder."""

from __future__ import annotations

import os
import re
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

__all__ = ["is_named", "named"]


def is_named(spec: str) -> bool:
    """Whether `spec` has the form `module:attribute`, either with dots."""
    return re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", spec) is not None


def named(spec: str) -> Any:
    """The object that `spec` names.

    The command `pytest` does not look for modules in the current folder, where a user's own file is. Where the module
    is nowhere else it does from here on, after everything else, so that nothing that is installed is hidden.

    Raises:
        ImportError, AttributeError: there is no such module or attribute.
    """
    module, _, path = spec.partition(":")
    package = module.partition(".")[0]
    if package not in sys.modules and find_spec(package) is None and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    found: Any = import_module(module)
    for attribute in path.split("."):
        found = getattr(found, attribute)
    return found
