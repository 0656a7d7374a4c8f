"""Engines: the implementations of freezing that the suites can judge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, runtime_checkable

from pytest_circuitfreeze.named import is_named, named
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

    An engine may also say what it does not do. What it does not claim is reported as not offered, never as passed:

    - ``supports(model, config) -> str | None``: a reason where it does not offer to freeze a model as one config, or
      several together, say;
    - ``not_offered``, a mapping: for each claim that it does not make (a shipped test's name without ``test_``), why.

    What it must refuse is reported as refused, and tested to be: an ``UnsupportedModelError`` when it is to freeze so,
    and for all of a model a reason from ``refuses(model) -> str | None``.

    An engine that runs another model in place of the one that it is given, with modules at the same paths, gives it as
    the attribute ``stand_in`` of what it yields, and as that of what ``unfrozen(model)`` gives: a callable that runs it
    without a freeze. The suites' recorders look into that one, and compare frozen with unfrozen there.
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

    def refuses(self, model: torch.nn.Module) -> str | None:
        """Why a model cannot be served at all."""
        from freeze_core import UnsupportedModelError

        try:
            self._freezer.get_model_config(model)
        except UnsupportedModelError as error:
            return str(error)
        return None


_ADAPTERS = "pytest_circuitfreeze.adapters"
BUILT_IN: Mapping[str, str] = MappingProxyType(
    {
        "freeze_core": "pytest_circuitfreeze.engines:FreezeCore",
        "hooks": f"{_ADAPTERS}.hooks:HookEngine",
        "nnsight": f"{_ADAPTERS}.nnsight:NNsightEngine",
        "pyvene": f"{_ADAPTERS}.pyvene:PyveneEngine",
        "transformer_lens": f"{_ADAPTERS}.transformer_lens:TransformerLensEngine",
    }
)
"""Where the built-in engines are; an adapter's library is imported with it, so only when it is chosen."""

EXTRAS: Mapping[str, str] = MappingProxyType(
    {"nnsight": "nnsight", "pyvene": "pyvene", "transformer_lens": "transformer-lens"}
)
"""The optional extra that brings the library of a built-in engine."""


def check_engine_name(spec: str) -> None:
    """Refuses what cannot name an engine, without importing anything.

    Raises:
        ValueError: neither a built-in name, nor an entry point, nor ``module:attribute``.
    """
    if spec in BUILT_IN or is_named(spec):
        return
    installed = entry_point_engines()
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
    try:
        found = _resolve(BUILT_IN.get(spec, spec))
        if isinstance(found, type) or not _is_engine(found):
            found = found()
    except Exception as error:  # whatever a stranger's module or factory raises
        raise EngineError(_why_not(spec, error)) from error
    if not _is_engine(found):
        raise EngineError(
            f"engine {spec!r} gave {found!r}, which is no engine: it needs name (a str) and freeze(model, config)"
        )
    return found


def _why_not(spec: str, error: Exception) -> str:
    missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if spec in EXTRAS and missing == spec:
        extra = EXTRAS[spec]
        return f"engine {spec!r} needs {extra}, which is not installed: pip install 'pytest-circuitfreeze[{extra}]'"
    return f"engine {spec!r} cannot be loaded: {type(error).__name__}: {error}"


def _resolve(spec: str) -> Any:
    if not is_named(spec):
        return next(entry for entry in entry_point_engines() if entry.name == spec).load()
    return named(spec)


def _is_engine(found: object) -> TypeGuard[Engine]:
    return isinstance(found, Engine) and isinstance(found.name, str) and callable(found.freeze)


def entry_point_engines() -> list[EntryPoint]:
    """The engines that installed packages offer."""
    return list(entry_points(group=GROUP))
