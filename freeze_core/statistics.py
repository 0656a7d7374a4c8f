"""Statistics of activations over a data set: what `mean` and `noise` use in the place of those of the pass."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from freeze_core.files import Saved
from freeze_core.vocabulary import ROLES, Role

__all__ = ["ActivationStatistics", "LayerStatistics", "digest_of"]


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Mean and population standard deviation of a layer's activations, float64 `[heads, head_dim]` by role.

    Of a layer that each pass runs several times `[run, heads, head_dim]`, of each run by itself.
    """

    mean: Mapping[Role, Tensor]
    std: Mapping[Role, Tensor]

    def copied(self) -> LayerStatistics:
        """A copy of its own: what is written to the original later does not reach it."""
        mean, std = ({role: values[role].clone() for role in values} for values in (self.mean, self.std))
        return LayerStatistics(mean, std)

    def digest(self) -> str:
        """A short hash of the values."""
        return digest_of(values[role] for values in (self.mean, self.std) for role in sorted(values))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LayerStatistics) and self.digest() == other.digest()

    def __hash__(self) -> int:
        return hash(self.digest())


def digest_of(tensors: Iterable[Tensor]) -> str:
    """A short hash of the tensors' values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class ActivationStatistics(Saved, Mapping[int, LayerStatistics]):
    """A mapping from layer to its statistics.

    Args:
        layers: the statistics.
        tokens: over how many real tokens.
        identity: what the model is called, see `freeze_core.identity`.
        attention: whose they are: `self`, `cross` or `encoder`.
    """

    file_format = "circuitfreeze-statistics-1"
    file_title = "statistics"

    def __init__(
        self, layers: Mapping[int, LayerStatistics], tokens: int, identity: str, attention: str = "self"
    ) -> None:
        self._layers = dict(layers)
        self.tokens = tokens
        self.identity = identity
        self.attention = attention

    def __getitem__(self, layer: int) -> LayerStatistics:
        return self._layers[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return f"ActivationStatistics(layers={list(self._layers)}, tokens={self.tokens})"

    def tensors(self) -> dict[str, Tensor]:
        """All values by a name that says whose they are."""
        return {
            f"{layer}.{role}.{name}": values[role]
            for layer, one in self.items()
            for name, values in (("mean", one.mean), ("std", one.std))
            for role in values
        }

    def facts(self) -> dict[str, str]:
        """All else that they are made of, as text."""
        return {"tokens": str(self.tokens), "identity": self.identity, "attention": self.attention}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> ActivationStatistics:
        """What gave these `tensors` and `facts`.

        Raises:
            KeyError, ValueError: one is missing, or no such thing.
        """
        layers: dict[int, LayerStatistics] = {}
        for layer in sorted({int(name.split(".")[0]) for name in tensors}):
            mean, std = ({role: tensors[f"{layer}.{role}.{name}"] for role in ROLES} for name in ("mean", "std"))
            layers[layer] = LayerStatistics(mean, std)
        for name, values in tensors.items():
            if not bool(values.isfinite().all()) or (name.endswith("std") and bool((values < 0).any())):
                raise ValueError(f"{name} has values that no calibration gives")
        return cls(layers, int(facts["tokens"]), facts["identity"], facts["attention"])

    def _parts(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        return self.tensors(), self.facts()

    @classmethod
    def _of_parts(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> ActivationStatistics:
        return cls.of(tensors, facts)
