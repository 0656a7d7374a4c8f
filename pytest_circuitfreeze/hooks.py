"""Hooks that a project implements in its root conftest.py, or a plugin: more models, more claims."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

# A specification has no body to give what it says: pytest calls the implementations.


@pytest.hookspec
def pytest_circuitfreeze_models(config: pytest.Config) -> Mapping[str, Callable[[], torch.nn.Module]]:  # type: ignore[empty-body]
    """Models to validate beside the chosen ones: by the name that ids and tables show, a factory without arguments.

    A factory is called when a test first needs its model. All conftest.py files that are asked are loaded at the start.
    """


@pytest.hookspec
def pytest_circuitfreeze_claims(config: pytest.Config) -> Iterable[str]:  # type: ignore[empty-body]
    """Modules, by their full names, whose functions `test_*` are claims to try beside the shipped ones.

    They are collected as `circuitfreeze/<module>::<test>[<model>]`, and imported when the run was started with
    `--circuitfreeze`.
    """
