"""The versions that the metadata allow are those that are run: by tox, by the workflow and with the constraints."""

from __future__ import annotations

import ast
import runpy
import sys
import tomllib
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

CHECKOUT = Path(__file__).parents[2]
PYPROJECT: dict[str, Any] = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
BUILD_REQUIRES: list[str] = PYPROJECT["build-system"]["requires"]
REQUIREMENTS = [Requirement(text) for text in PROJECT["dependencies"]]
EXTRAS = {
    name: [Requirement(text) for text in texts if not text.startswith(PROJECT["name"])]
    for name, texts in PROJECT["optional-dependencies"].items()
}
BUILDS_ONLY = {"setuptools"}
"""What tests build a wheel with, and no code runs on."""


def pins(text: str) -> dict[str, Version]:
    """The versions that lines of `name==version` pin, by name."""
    pairs = [line.strip().split("==") for line in text.splitlines() if "==" in line and not line.startswith("#")]
    return {name.lower().replace("_", "-"): Version(version) for name, version in pairs}


def test_no_requirement_has_an_upper_bound() -> None:
    everything = [*REQUIREMENTS, *(one for extra in EXTRAS.values() for one in extra)]
    assert len(everything) > 20
    assert {specifier.operator for one in everything for specifier in one.specifier} == {">="}
    assert PROJECT["requires-python"] == ">=3.11"


def test_oldest_environment_has_each_lower_bound() -> None:
    tox = ConfigParser()
    tox.read(CHECKOUT / "tox.ini")
    bounds = {
        one.name: Version(next(iter(one.specifier)).version)
        for one in [*REQUIREMENTS, *EXTRAS["studies"], *EXTRAS["test"]]
        if one.name not in BUILDS_ONLY
    }
    assert pins(tox["testenv:oldest"]["deps"]) == bounds


def test_constraints_pin_what_the_metadata_allow() -> None:
    pinned = pins((CHECKOUT / "constraints.txt").read_text(encoding="utf-8"))
    engines = {"transformer-lens", "nnsight", "pyvene"}  # each in an environment of its own
    for one in [*REQUIREMENTS, *(one for name, extra in EXTRAS.items() if name not in engines for one in extra)]:
        assert one.specifier.contains(pinned[one.name.lower()]), one


def test_older_python_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import_module("setuptools")  # under the real version, which it looks at
    with monkeypatch.context() as older:
        older.setattr(sys, "version_info", (3, 10, 13, "final", 0))
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(CHECKOUT / "setup.py"))
    assert str(caught.value).startswith("pytest-circuitfreeze needs Python 3.11 or newer, and this is Python 3.")


def test_older_pythons_can_read_the_set_up() -> None:
    tree = ast.parse((CHECKOUT / "setup.py").read_text(encoding="utf-8"))
    newer = (ast.JoinedStr, ast.AnnAssign, ast.NamedExpr, ast.Match)
    assert not [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, newer)]
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    backends = [Requirement(text) for text in BUILD_REQUIRES]
    for python in ("3.6", "3.8", "3.9", "3.11", "3.14"):
        chosen = [one for one in backends if one.marker is None or one.marker.evaluate({"python_version": python})]
        assert [one.name for one in chosen] == ["setuptools"]
        assert bool(chosen[0].specifier) == (Version(python) >= Version("3.9"))


def test_supported_pythons_are_run_every_week() -> None:
    prefix = "Programming Language :: Python :: "
    supported = {text.removeprefix(prefix) for text in PROJECT["classifiers"] if text.startswith(prefix)}
    assert all(SpecifierSet(PROJECT["requires-python"]).contains(python) for python in supported)
    own = yaml.safe_load((CHECKOUT / ".github" / "workflows" / "versions.yml").read_text(encoding="utf-8"))
    newest = [one for one in own["jobs"]["versions"]["strategy"]["matrix"]["include"] if one["environment"] == "newest"]
    assert {one["python"] for one in newest} == supported
    for_users = yaml.safe_load((CHECKOUT / "docs" / "versions-workflow.yml").read_text(encoding="utf-8"))
    assert set(for_users["jobs"]["newest"]["strategy"]["matrix"]["python"]) == supported
