"""The import graph of the library: floors without a circle, and a freezing mechanism that is small enough to read."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "freeze_core").rglob("*.py")
}
FLOORS = (
    ("versions", "vocabulary", "extras", "ordinary", "generators"),
    ("errors",),
    ("arguments", "files", "identity", "inputs", "forward_patch", "activations"),
    ("statistics",),
    ("config", "attention"),
    ("freezing",),
    ("recording", "diagnostics", "results"),
    ("calibration", "scoring"),
    ("runs",),
    ("studies",),
    ("circuits", "vectors"),
    ("plots", "freezer", "interventions"),
    ("",),
)
"""The files and folders of `freeze_core` from the ground up; each may import those of earlier rows."""


def imports_of(module):
    """The modules of the library that one imports when it is imported or run, but not for its annotations alone."""
    found = set()

    def visit(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.ImportFrom) and (child.module or "").partition(".")[0] == "freeze_core":
                for name in child.names:
                    inner = f"{child.module}.{name.name}"
                    found.add(inner if inner in FILES else child.module)
            visit(child)

    visit(ast.parse(FILES[module].read_text(encoding="utf-8")))
    return found


GRAPH = {module: imports_of(module) for module in FILES}


def floor_of(module):
    name = module.split(".")[1] if "." in module else ""
    return next(number for number, names in enumerate(FLOORS) if name in names)


def test_no_module_imports_from_a_higher_floor():
    higher = {
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        for other in others
        if floor_of(other) > floor_of(module)
    }
    assert not higher


def test_no_modules_import_each_other_in_a_circle():
    assert len(list(TopologicalSorter(GRAPH).static_order())) >= len(FILES)  # raises CycleError


def needed_by(module):
    """`module` and all that it imports, directly or not."""
    needed, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            waiting += GRAPH[name]
    return needed


def test_what_installs_freezes_is_small_enough_to_read():
    needed = needed_by("freeze_core.freezing.install")
    lines = sum(len(FILES[name].read_text(encoding="utf-8").splitlines()) for name in needed)
    assert (len(needed), lines) <= (28, 3800)
