"""The honest engine of hooks, and so of another kind than freeze_core: what checks must accept.

It is the built-in engine `hooks`. Its methods are small, so that a broken engine (`broken_engines`) is an honest one
with a single method changed.
"""

from pytest_circuitfreeze.adapters.arithmetic import CIRCUITS, Blend
from pytest_circuitfreeze.adapters.hooks import HookEngine
from pytest_circuitfreeze.adapters.places import Layer, layers

__all__ = ["CIRCUITS", "Blend", "HookEngine", "Layer", "layers"]
