"""What a user asks for: one config says which activations of which heads are held at which value."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from numbers import Integral, Real
from typing import Any, Literal, TypeVar

from freeze_core.errors import InterventionError

__all__ = [
    "BackwardMode",
    "CircuitType",
    "FreezeType",
    "InterventionConfig",
    "KVScope",
    "ModelArchitecture",
    "Role",
]

Role = Literal["q", "k", "v"]
"""A single activation: queries, keys or values."""


class CircuitType(StrEnum):
    """Which activations to freeze: a whole circuit, both of them, or a single activation.

    QK decides where a head looks (`q` and `k`), OV what it moves (`v`): Elhage et al., "A Mathematical
    Framework for Transformer Circuits", 2021.
    """

    QK = "qk"
    OV = "ov"
    BOTH = "both"
    Q = "q"
    K = "k"
    V = "v"

    @property
    def roles(self) -> tuple[Role, ...]:
        """The single activations that make up this circuit."""
        return _ROLES[self]


_ROLES: dict[CircuitType, tuple[Role, ...]] = {
    CircuitType.QK: ("q", "k"),
    CircuitType.OV: ("v",),
    CircuitType.BOTH: ("q", "k", "v"),
    CircuitType.Q: ("q",),
    CircuitType.K: ("k",),
    CircuitType.V: ("v",),
}


class FreezeType(StrEnum):
    """The replacement value."""

    ZERO = "zero"
    MEAN = "mean"
    NOISE = "noise"
    REFERENCE = "reference"
    RESAMPLE = "resample"


class BackwardMode(StrEnum):
    """What the gradient does at a frozen activation.

    `stopgrad` stops it in proportion to the strength; `ste` is the straight-through estimator (Bengio et al.,
    "Estimating or Propagating Gradients Through Stochastic Neurons", 2013); `circuit_ste` is the gradient of
    the unfrozen attention.
    """

    STOPGRAD = "stopgrad"
    STE = "ste"
    CIRCUIT_STE = "circuit_ste"


class KVScope(StrEnum):
    """Whether K and V are frozen for the whole group of query heads that share them, or for the chosen heads."""

    GROUP = "group"
    HEAD = "head"


class ModelArchitecture(StrEnum):
    """How a model stores its query, key and value projections."""

    SEPARATE_QKV = "separate_qkv"
    FUSED_QKV = "fused_qkv"
    FLASH_ATTENTION = "flash_attention"


@dataclass
class InterventionConfig:
    """Which circuit of which heads is held at which value; checked when built and again when used.

    Args:
        layer_indices: decoder layers, attention or not; negative ones count from the end; `None` is every layer
            that has attention.
        head_indices: query heads, in the same way; `None` is all of them.
        circuit: `qk`, `ov`, `both`, or one activation `q`, `k`, `v`.
        freeze_type: the replacement `r`: `zero`, `mean` (over batch and real positions of the pass) or `noise`.
            `reference` and `resample` are not served yet.
        backward_mode: `stopgrad` or `ste`. `circuit_ste` is not served yet.
        preserve_gradients: `False` allows a parameter's gradient to be `None` where nothing flows.
        kv_scope: `group` freezes the KV heads that serve the chosen query heads, and so touches the neighbours
            that share them; `head` gives each chosen query head its own view of K and V.
        strength: `a` in `x' = x + a (r - x)`, finite, in [0, 1].
        seed: any int; chooses the draw of `noise`.
        noise_std: standard deviation of `noise` around 0, in the activation's own unit; `None` keeps the mean and
            standard deviation of each feature.
        statistics, reference: not served yet, must be `None`.
        attention: `self`; `cross` and `encoder` are not served yet.

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
    statistics: Any = None
    reference: Any = None
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
        self._check_served()

    def _check_served(self) -> None:
        later = {
            "freeze_type": ({"reference", "resample"}, "zero, mean or noise"),
            "backward_mode": ({"circuit_ste"}, "stopgrad or ste"),
            "attention": ({"cross", "encoder"}, "self"),
        }
        for field, (values, allowed) in later.items():
            if getattr(self, field) in values:
                raise _refusal(field, str(getattr(self, field)), f"{allowed}; this one is not served yet")
        if self.attention != "self":
            raise _refusal("attention", self.attention, "self")
        for field in ("statistics", "reference"):
            if getattr(self, field) is not None:
                raise _refusal(field, getattr(self, field), "None; anything else is not served yet")

    def checked(self) -> InterventionConfig:
        """A copy of its own, checked anew: what the caller changes later does not reach it."""
        return dataclasses.replace(self)


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
    if not math.isfinite(value) or not 0 <= float(value) <= upper:
        raise _refusal(field, value, allowed)


def _refusal(field: str, value: object, allowed: str) -> InterventionError:
    return InterventionError(f"{field}={value!r}: must be {allowed}")
