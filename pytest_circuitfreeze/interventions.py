"""A researcher's own intervention, as an engine that the suites can judge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from pytest_circuitfreeze.engines import Engine
from pytest_circuitfreeze.origins import remembered

if TYPE_CHECKING:
    import torch

    from freeze_core import InterventionConfig

    Freeze = Callable[[torch.nn.Module, InterventionConfig], AbstractContextManager[object]]

__all__ = ["FixedIntervention", "FunctionEngine", "as_engine", "engine_of", "fixed"]


class FunctionEngine:
    """An engine made of a function `freeze(model, config)`, which takes one config.

    Args:
        freeze: gives a context manager. What that yields is called as the frozen model; where it yields nothing that
            can be called, the model itself is, which was frozen in place.
    """

    def __init__(self, freeze: Freeze) -> None:
        self._freeze = freeze
        self.name = _name(freeze)

    @contextmanager
    def freeze(
        self, model: torch.nn.Module, config: InterventionConfig | Sequence[InterventionConfig]
    ) -> Iterator[Callable[..., Any]]:
        """Freezes `model` as the function does.

        Raises:
            NotApplicable: several configs were given.
        """
        with self._freeze(model, self._served(config)) as frozen:
            yield frozen if callable(frozen) else model

    def _served(self, config: InterventionConfig | Sequence[InterventionConfig]) -> InterventionConfig:
        from freeze_core import InterventionConfig
        from pytest_circuitfreeze.suites.claims import NotApplicable

        several = [config] if isinstance(config, InterventionConfig) else list(config)
        if len(several) != 1:
            raise NotApplicable(f"{self.name} takes one config at a time")
        return several[0]


class FixedIntervention(FunctionEngine):
    """An engine that does one thing alone, as `config` states it; made by :func:`fixed`."""

    def __init__(
        self, intervention: Callable[[torch.nn.Module], AbstractContextManager[object]], config: InterventionConfig
    ) -> None:
        super().__init__(lambda model, _: intervention(model))
        self.name = _name(intervention)
        self.config = config.checked()

    def _served(self, config: InterventionConfig | Sequence[InterventionConfig]) -> InterventionConfig:
        from pytest_circuitfreeze.suites.claims import NotApplicable

        asked = super()._served(config)
        if asked != self.config:
            raise NotApplicable(f"{self.name} is fixed, and does not freeze otherwise than its config says")
        return asked


def _name(function: object) -> str:
    name: str = getattr(function, "__name__", type(function).__name__)
    return "the intervention" if name == "<lambda>" else name


@remembered
def fixed(
    intervention: Callable[[torch.nn.Module], AbstractContextManager[object]], config: InterventionConfig
) -> FixedIntervention:
    """An intervention that takes no config, such as `lambda model: my_ablation(model, layer=3, head=5)`.

    Args:
        intervention: gives a context manager for a model; what it yields is called as under `FunctionEngine`.
        config: what it does. `layer_indices`, `head_indices`, `circuit` and `kv_scope` say where; the other fields are
            what the claims about values and gradients hold it to.

    Raises:
        InterventionError: `config` is no config.
    """
    from freeze_core.config import check_config

    check_config(config)
    return FixedIntervention(intervention, config)


@remembered
def engine_of(freeze: Freeze) -> FunctionEngine:
    """An engine made of a function `freeze(model, config)`."""
    return FunctionEngine(freeze)


def as_engine(freeze: Engine | Freeze) -> Engine:
    """`freeze` itself where it is an engine, an engine made of it where it is a function.

    Raises:
        TypeError: it is neither.
    """
    if not isinstance(freeze, type) and isinstance(freeze, Engine):
        return freeze
    if callable(freeze):
        return engine_of(freeze)
    raise TypeError(
        f"freeze={freeze!r}: must be a function freeze(model, config) that gives a context manager, or an engine"
    )
