"""What a user asks for: one config says which activations of which heads are held at which value."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from torch import Tensor

from freeze_core.activations import Recording
from freeze_core.arguments import check_choice, check_flag, check_type, is_distinct, is_finite, is_index, refuse
from freeze_core.errors import InterventionError
from freeze_core.files import Saved, parsed, under
from freeze_core.statistics import ActivationStatistics
from freeze_core.vocabulary import ATTENTION, BackwardMode, CircuitType, FreezeType, KVScope

__all__ = ["InterventionConfig", "check_config", "check_fields", "check_on_stale_cache", "config_of", "parts_of"]


@dataclass
class InterventionConfig(Saved):
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

    file_format = "circuitfreeze-config-1"
    file_title = "config"

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
        check_flag("preserve_gradients", self.preserve_gradients)
        if not is_finite(self.strength, 0, 1):
            refuse("strength", self.strength, "a finite number in [0, 1]")
        if self.noise_std is not None and not is_finite(self.noise_std, 0):
            refuse("noise_std", self.noise_std, "None or a finite number that is not negative")
        if not is_index(self.seed):
            refuse("seed", self.seed, "an int")
        check_choice("attention", self.attention, ATTENTION)
        if self.freeze_type == FreezeType.REFERENCE and not isinstance(self.reference, Recording):
            refuse(
                "reference", self.reference, "what AttentionCircuitFreezer.record returns, for freeze_type 'reference'"
            )
        if isinstance(self.reference, Recording) and self.reference.attention != self.attention:
            refuse(
                "reference", self.reference, f"recorded with attention='{self.attention}', the attention to be frozen"
            )
        if self.reference is not None and self.freeze_type != FreezeType.REFERENCE:
            refuse("reference", self.reference, f"None under freeze_type '{self.freeze_type}', which does not use it")
        if self.statistics is not None:
            what = "None or what AttentionCircuitFreezer.calibrate returns"
            check_type("statistics", self.statistics, ActivationStatistics, what)

    def checked(self) -> InterventionConfig:
        """A copy of its own, checked anew: what the caller changes later does not reach it."""
        return dataclasses.replace(self)

    def _parts(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        return parts_of(self.checked())

    @classmethod
    def _of_parts(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> InterventionConfig:
        return config_of(tensors, facts)


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
    known = {"statistics": "statistics" in facts, "reference": fields["freeze_type"] == FreezeType.REFERENCE}
    for whole in tensors:
        if not known.get(whole.partition(".")[0]):
            raise ValueError(f"a tensor {whole}, which no field of this config has")
    if "statistics" in facts:
        fields["statistics"] = ActivationStatistics.of(under("statistics", tensors), parsed(facts["statistics"]))
    if fields["freeze_type"] == FreezeType.REFERENCE:
        fields["reference"] = Recording.of(under("reference", tensors), fields["attention"])
    return InterventionConfig(**fields)


_Choice = TypeVar("_Choice", bound=StrEnum)


def _choice(field: str, value: object, options: type[_Choice]) -> _Choice:
    check_choice(field, value, options)
    return options(str(value))


def _check_indices(field: str, value: object) -> None:
    if value is not None and not is_distinct(value, is_index):
        allowed = "None or a list of distinct ints that is not empty"
        refuse(field, value, f"{allowed} (a bool is not an index, and no index may be repeated)")


def check_config(value: object) -> None:
    """Raises `InterventionError` unless `value` is a config."""
    check_type("config", value, InterventionConfig, "an InterventionConfig")


def check_fields(fields: Mapping[str, object], taken: Collection[str], others: Collection[str] = ()) -> None:
    """Raises `InterventionError` for a keyword that is not a field of a config, or one that a call has `taken` over.

    Args:
        others: the arguments that the call has in their place.
    """
    allowed = {*InterventionConfig.__dataclass_fields__.keys() - taken, *others}
    if unknown := sorted(fields.keys() - allowed):
        raise InterventionError(f"{', '.join(unknown)}: unknown argument; allowed are {', '.join(sorted(allowed))}")


def check_on_stale_cache(value: object) -> None:
    """Raises `InterventionError` unless `value` is a way to deal with a stale cache."""
    check_choice("on_stale_cache", value, ("warn", "error", "ignore"))
