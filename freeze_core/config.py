"""What a user asks for: one config says which activations of which heads are held at which value."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from numbers import Integral, Real
from os import PathLike
from typing import TypeVar

from torch import Tensor

from freeze_core.activations import Recording
from freeze_core.errors import InterventionError, shown
from freeze_core.files import parsed, read_file, write_file
from freeze_core.statistics import ActivationStatistics
from freeze_core.vocabulary import ATTENTION, BackwardMode, CircuitType, FreezeType, KVScope

__all__ = ["InterventionConfig", "check_config", "check_on_stale_cache", "config_of", "parts_of"]

FORMAT = "circuitfreeze-config-1"


@dataclass
class InterventionConfig:
    """Which circuit of which heads is held at which value; checked when built and again when used.

    Args:
        layer_indices: decoder layers, attention or not; negative ones count from the end; `None` is every layer
            that has attention.
        head_indices: query heads, in the same way; `None` is all of them.
        circuit: `qk`, `ov`, `both`, or one activation `q`, `k`, `v`.
        freeze_type: the replacement `r`: `zero`; `mean` of each feature over batch and real positions of the pass
            (padding is what the model's argument `attention_mask` says; a mask under another name is refused);
            `noise`, drawn; `reference`, what was recorded on another input; `resample`, another row's.
        backward_mode: `stopgrad`, `ste`, or `circuit_ste`, whose gradient is that of the attention left untouched.
        preserve_gradients: `False` allows a parameter's gradient to be `None` where nothing flows.
        kv_scope: `group` freezes the KV heads that serve the chosen query heads, and so touches the neighbours
            that share them; `head` gives each chosen query head its own view of K and V.
        strength: `a` in `x' = x + a (r - x)`, finite, in [0, 1].
        seed: any int; chooses the draw of `noise`.
        noise_std: standard deviation of `noise` around 0, in the activation's own unit; `None` keeps the mean and
            standard deviation of each feature.
        statistics: calibrated statistics for `mean` and `noise` in the place of those of the pass.
        reference: the recording for `reference`.
        attention: `self`, `cross` (keys and values of an encoder's states) or `encoder` (the encoder's own).

    Raises:
        InterventionError: naming the field, the value and what is allowed.
    """

    layer_indices: Sequence[int] | None = None
    head_indices: Sequence[int] | None = None
    circuit: CircuitType | str = CircuitType.BOTH
    freeze_type: FreezeType | str = FreezeType.ZERO
    backward_mode: BackwardMode | str = BackwardMode.STOPGRAD
    preserve_gradients: bool = True
    kv_scope: KVScope | str = KVScope.GROUP
    strength: float = 1.0
    seed: int = 0
    noise_std: float | None = None
    statistics: ActivationStatistics | None = None
    reference: Recording | None = None
    attention: str = "self"

    def __post_init__(self) -> None:
        _check_indices("layer_indices", self.layer_indices)
        _check_indices("head_indices", self.head_indices)
        self.circuit = _choice("circuit", self.circuit, CircuitType)
        self.freeze_type = _choice("freeze_type", self.freeze_type, FreezeType)
        self.backward_mode = _choice("backward_mode", self.backward_mode, BackwardMode)
        self.kv_scope = _choice("kv_scope", self.kv_scope, KVScope)
        if not isinstance(self.preserve_gradients, bool):
            raise _refusal("preserve_gradients", self.preserve_gradients, "True or False")
        _check_real("strength", self.strength, "a finite number in [0, 1]", upper=1.0)
        if self.noise_std is not None:
            _check_real("noise_std", self.noise_std, "None or a finite number that is not negative")
        if isinstance(self.seed, bool) or not isinstance(self.seed, Integral):
            raise _refusal("seed", self.seed, "an int")
        if not isinstance(self.attention, str) or self.attention not in ATTENTION:
            raise _refusal("attention", self.attention, f"one of {', '.join(ATTENTION)}")
        if self.freeze_type == FreezeType.REFERENCE and not isinstance(self.reference, Recording):
            raise _refusal(
                "reference", self.reference, "what AttentionCircuitFreezer.record returns, for freeze_type 'reference'"
            )
        if isinstance(self.reference, Recording) and self.reference.attention != self.attention:
            raise _refusal(
                "reference", self.reference, f"recorded with attention='{self.attention}', the attention to be frozen"
            )
        if self.reference is not None and self.freeze_type != FreezeType.REFERENCE:
            raise _refusal(
                "reference", self.reference, f"None under freeze_type '{self.freeze_type}', which does not use it"
            )
        if self.statistics is not None and not isinstance(self.statistics, ActivationStatistics):
            raise _refusal("statistics", self.statistics, "None or what AttentionCircuitFreezer.calibrate returns")

    def checked(self) -> InterventionConfig:
        """A copy of its own, checked anew: what the caller changes later does not reach it."""
        return dataclasses.replace(self)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the config to a safetensors file, whole or not at all, with its statistics and its recording.

        Raises:
            InterventionError: a field was changed to what is not allowed.
            OSError: the file cannot be written.
        """
        tensors, facts = parts_of(self.checked())
        write_file(path, FORMAT, tensors, facts)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> InterventionConfig:
        """Reads what `save` wrote; tensors lie on the CPU.

        Raises:
            InterventionError: the file is not there, or holds no config.
        """
        tensors, facts = read_file(path, FORMAT, "config")
        try:
            return config_of(tensors, facts)
        except (KeyError, TypeError, ValueError) as error:
            raise InterventionError(f"config of {path}: not what save writes ({error})") from error


def parts_of(config: InterventionConfig) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a config, by names that say whose they are, and all else as text."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    statistics, reference = fields.pop("statistics"), fields.pop("reference")
    for name in ("layer_indices", "head_indices"):
        fields[name] = fields[name] if fields[name] is None else [int(index) for index in fields[name]]
    for name, number in (("strength", float), ("seed", int), ("noise_std", float)):
        fields[name] = fields[name] if fields[name] is None else number(fields[name])
    tensors: dict[str, Tensor] = {}
    facts = {"config": json.dumps(fields)}
    if statistics is not None:
        tensors |= {f"statistics.{name}": tensor for name, tensor in statistics.tensors().items()}
        facts["statistics"] = json.dumps(statistics.facts())
    if reference is not None:
        tensors |= {f"reference.{name}": tensor for name, tensor in reference.tensors().items()}
    return tensors, facts


def config_of(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> InterventionConfig:
    """The config that has these parts.

    Raises:
        KeyError, TypeError, ValueError: one is missing, or no such thing.
    """
    fields = parsed(facts["config"])

    def under(name: str) -> dict[str, Tensor]:
        return {rest: tensors[whole] for whole in tensors if (rest := whole.removeprefix(f"{name}.")) != whole}

    known = {"statistics": "statistics" in facts, "reference": fields["freeze_type"] == FreezeType.REFERENCE}
    for whole in tensors:
        if not known.get(whole.partition(".")[0]):
            raise ValueError(f"a tensor {whole}, which no field of this config has")
    if "statistics" in facts:
        fields["statistics"] = ActivationStatistics.of(under("statistics"), parsed(facts["statistics"]))
    if fields["freeze_type"] == FreezeType.REFERENCE:
        fields["reference"] = Recording.of(under("reference"), fields["attention"])
    return InterventionConfig(**fields)


_Choice = TypeVar("_Choice", bound=StrEnum)


def _choice(field: str, value: object, options: type[_Choice]) -> _Choice:
    if isinstance(value, str):
        try:
            return options(value)
        except ValueError:
            pass
    raise _refusal(field, value, "one of " + ", ".join(options))


def _check_indices(field: str, value: object) -> None:
    if value is None:
        return
    allowed = "None or a list of distinct ints that is not empty"
    if isinstance(value, str | bytes) or not isinstance(value, Sequence) or len(value) == 0:
        raise _refusal(field, value, allowed)
    if any(isinstance(index, bool) or not isinstance(index, Integral) for index in value):
        raise _refusal(field, value, f"{allowed} (a bool is no index)")
    if len(set(value)) < len(value):
        raise _refusal(field, value, f"{allowed}; an index is repeated")


def _check_real(field: str, value: object, allowed: str, upper: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _refusal(field, value, allowed)
    try:
        number = float(value)
    except (OverflowError, ValueError):
        number = math.inf
    if not math.isfinite(number) or not 0 <= number <= upper:
        raise _refusal(field, value, allowed)


def _refusal(field: str, value: object, allowed: str) -> InterventionError:
    return InterventionError(f"{field}={shown(value)}: must be {allowed}")


def check_config(value: object) -> None:
    """Raises `InterventionError` for what is no config."""
    if not isinstance(value, InterventionConfig):
        raise InterventionError(f"config={shown(value)}: must be an InterventionConfig")


def check_on_stale_cache(value: object) -> None:
    """Raises `InterventionError` for what is no way to deal with a stale cache."""
    if not isinstance(value, str) or value not in ("warn", "error", "ignore"):
        raise InterventionError(f"on_stale_cache={shown(value)}: must be one of warn, error, ignore")
