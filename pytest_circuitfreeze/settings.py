"""What one run validates, and how: the options of the command line or the ini file as one frozen object."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_circuitfreeze.accepted import Accepted
from pytest_circuitfreeze.options import OPTIONS, Option, distinct

if TYPE_CHECKING:
    import torch

# Where the controller of a distributed run leaves the seed for its workers.
WORKER_SEED = "circuitfreeze_seed"


@dataclass(frozen=True)
class Settings:
    """What one run validates, and how. Built once from pytest's config; see :func:`settings_of`."""

    enabled: bool
    architectures: tuple[str, ...]
    models: tuple[str, ...]
    engine: str
    profile: str
    seed: int
    device: str
    dtype: str | None
    """``None`` is float32 for tiny models and checkpoints, and whatever a factory built its model in."""
    attn: str | None
    """``None`` leaves the choice of the attention implementation to transformers."""
    bench: bool
    report: Path | None
    accepted: tuple[Accepted, ...] = ()
    bench_limit: float | None = None
    """How many times a plain forward a frozen one of a chosen model may cost."""
    factories: Mapping[str, Callable[[], torch.nn.Module]] = field(default_factory=dict)
    """Of those among ``models`` that the hook ``pytest_circuitfreeze_models`` gave, by name."""

    @property
    def targets(self) -> tuple[str, ...]:
        """Tiny architectures and then models, in the order asked for: the ids of ``circuit_model``."""
        return self.architectures + self.models

    @property
    def every_type(self) -> bool:
        """Whether all architectures were asked for, and none by its name."""
        from pytest_circuitfreeze.architectures import every_architecture

        return self.architectures == every_architecture()


_SETTINGS = pytest.StashKey[Settings]()


def settings_of(config: pytest.Config) -> Settings:
    """The run's settings, read at the first call.

    Raises:
        pytest.UsageError: a value is not allowed; names the option, the value and what is allowed.
    """
    if _SETTINGS not in config.stash:
        config.stash[_SETTINGS] = _read_settings(config)
    return config.stash[_SETTINGS]


def is_enabled(config: pytest.Config) -> bool:
    """Whether this run was asked for the shipped suites."""
    return bool(_read(config, OPTIONS[0]))


def is_listing(config: pytest.Config) -> bool:
    """Whether what there is to choose from is to be shown, instead of a run."""
    return bool(_read(config, next(option for option in OPTIONS if option.word == "list")))


def _read_settings(config: pytest.Config) -> Settings:
    values = {
        option.word.replace("-", "_") or "enabled": _read(config, option) for option in OPTIONS if option.word != "list"
    }
    architectures, models = values.pop("arch"), values.pop("model")
    factories = _factories(config)
    _demand_distinct("--circuitfreeze-model", models, "a tiny architecture of this run", architectures)
    _demand_distinct("pytest_circuitfreeze_models", factories, "a model of this run", (*architectures, *models))
    seed = _seed(config, values.pop("seed"), values["profile"])
    return Settings(architectures=architectures, models=(*models, *factories), seed=seed, factories=factories, **values)


def _demand_distinct(origin: str, names: Iterable[str], what: str, taken: tuple[str, ...]) -> None:
    for name in names:
        if name in taken:
            raise pytest.UsageError(f"{origin}: {name!r} is already {what}")


def _factories(config: pytest.Config) -> dict[str, Callable[[], torch.nn.Module]]:
    """What the implementations of the hook give, by name."""
    found: dict[str, Callable[[], torch.nn.Module]] = {}
    for given in config.hook.pytest_circuitfreeze_models(config=config):
        if not isinstance(given, Mapping) or not all(
            isinstance(name, str) and name.strip() and callable(factory) for name, factory in given.items()
        ):
            raise pytest.UsageError(
                f"pytest_circuitfreeze_models gave {given!r}; give a mapping from names to factories without arguments"
            )
        _demand_distinct("pytest_circuitfreeze_models", given, "a model of this run", tuple(found))
        found |= given
    return found


def _seed(config: pytest.Config, given: int | None, profile: str) -> int:
    """The seed given, else the controller's, else 0, or a new one for the thorough profile."""
    if given is not None:
        return given
    from_controller: int | None = getattr(config, "workerinput", {}).get(WORKER_SEED)
    if from_controller is not None:
        return from_controller
    return secrets.randbelow(2**32) if profile == "thorough" else 0


def _read(config: pytest.Config, option: Option) -> Any:
    """One option's parsed value: the command line's, else the ini file's, else its default."""
    given, origin = config.getoption(option.ini, None), option.flag
    if given is None:
        given, origin = config.getini(option.ini), f"{option.ini} (ini file)"
    if option.kind == "switch":
        return bool(given)
    try:
        if option.kind == "list":
            return distinct(tuple(option.parse(text) for text in given or ()))
        text = option.default if given is None else given
        return None if text is None else option.parse(text)
    except ValueError as error:
        raise pytest.UsageError(f"{origin}: {error}") from error
