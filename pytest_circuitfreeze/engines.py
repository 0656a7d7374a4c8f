"""Engines: the implementations of freezing that the suites can judge."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from pytest_circuitfreeze.origins import remembered

if TYPE_CHECKING:
    import torch

    from freeze_core import InterventionConfig

GROUP = "circuitfreeze.engines"


class EngineError(Exception):
    """An engine that cannot be had, or an object that is none."""


@runtime_checkable
class Engine(Protocol):
    """What the suites need of an implementation.

    An engine may also have ``supports(model, config) -> str | None``: a reason where it cannot do one.
    """

    @property
    def name(self) -> str:
        """What reports call it."""

    def freeze(
        self, model: torch.nn.Module, config: InterventionConfig | Sequence[InterventionConfig]
    ) -> AbstractContextManager[Callable[..., Any]]:
        """A context manager that yields a callable with the model's own call signature, frozen as asked."""


class FreezeCore:
    """The built-in engine: ``freeze_core.AttentionCircuitFreezer`` on the model itself."""

    name = "freeze_core"

    def __init__(self) -> None:
        from freeze_core import AttentionCircuitFreezer

        self._freezer = AttentionCircuitFreezer()

    @contextmanager
    def freeze(
        self, model: torch.nn.Module, config: InterventionConfig | Sequence[InterventionConfig]
    ) -> Iterator[torch.nn.Module]:
        """Freezes ``model`` in place for the length of the block and yields it."""
        with self._freezer.freeze_circuits(model, config):
            yield model

    def supports(self, model: torch.nn.Module, config: InterventionConfig | Sequence[InterventionConfig]) -> str | None:
        """Refuses models that it cannot serve at all; a config that it must serve is never refused here."""
        from freeze_core import UnsupportedModelError

        try:
            self._freezer.get_model_config(model)
        except UnsupportedModelError as error:
            return str(error)
        return None


BUILT_IN: dict[str, Callable[[], Engine]] = {"freeze_core": FreezeCore}


def check_engine_name(spec: str) -> None:
    """Refuses what cannot name an engine, without importing anything.

    Raises:
        ValueError: neither a built-in name, nor an entry point, nor ``module:attribute``.
    """
    if spec in BUILT_IN or _is_attribute(spec):
        return
    installed = _installed()
    if sum(entry.name == spec for entry in installed) > 1:
        places = ", ".join(entry.value for entry in installed if entry.name == spec)
        raise ValueError(f"{spec!r} is claimed by several entry points ({places}); name one as module:attribute")
    if all(entry.name != spec for entry in installed):
        known = ", ".join([*BUILT_IN, *sorted(entry.name for entry in installed)])
        raise ValueError(f"{spec!r} is no engine; choose from {known}, or give module:attribute")


@remembered
def load_engine(spec: str) -> Engine:
    """The engine that ``spec`` names: built in, an entry point of ``circuitfreeze.engines``, or ``module:attribute``.

    A class or factory is called without arguments; the caller keeps the one instance for the whole run.

    Raises:
        EngineError: it cannot be imported or built, or is no engine; names ``spec`` and what is wrong.
    """
    try:
        check_engine_name(spec)
    except ValueError as error:
        raise EngineError(str(error)) from error
    if spec in BUILT_IN:
        return BUILT_IN[spec]()
    try:
        found = _resolve(spec)
        if isinstance(found, type) or not _is_engine(found):
            found = found()
    except Exception as error:  # whatever a stranger's module or factory raises
        raise EngineError(f"engine {spec!r} cannot be loaded: {type(error).__name__}: {error}") from error
    if not _is_engine(found):
        raise EngineError(
            f"engine {spec!r} gave {found!r}, which is no engine: it needs name (a str) and freeze(model, config)"
        )
    return found  # type: ignore[no-any-return]


def _resolve(spec: str) -> Any:
    if not _is_attribute(spec):
        return next(entry for entry in _installed() if entry.name == spec).load()
    module, _, path = spec.partition(":")
    found: Any = import_module(module)
    for attribute in path.split("."):
        found = getattr(found, attribute)
    return found


def _is_attribute(spec: str) -> bool:
    return re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", spec) is not None


def _is_engine(found: object) -> bool:
    return isinstance(found, Engine) and isinstance(found.name, str) and callable(found.freeze)


def _installed() -> list[EntryPoint]:
    return list(entry_points(group=GROUP))
