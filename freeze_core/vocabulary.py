"""The words of the contract: activations, circuits, freeze types, backward modes."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

__all__ = [
    "ATTENTION",
    "ROLES",
    "BackwardMode",
    "CircuitType",
    "FreezeType",
    "KVScope",
    "ModelArchitecture",
    "Role",
]

Role = Literal["q", "k", "v", "z"]
"""A single activation: queries, keys, values, or a head's mixed values."""

ROLES: tuple[Role, ...] = ("q", "k", "v", "z")

ATTENTION = ("self", "cross", "encoder")
"""A decoder's own attention (or that of the only stack of layers), its attention to an encoder, the encoder's own."""


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
