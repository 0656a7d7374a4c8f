"""Statistics of activations over a data set: what `mean` and `noise` use in the place of those of the pass."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from freeze_core.errors import InterventionError
from freeze_core.vocabulary import ROLES, Role

if TYPE_CHECKING:
    from freeze_core.attention.sites import Sites

__all__ = ["ActivationStatistics", "LayerStatistics", "digest_of", "model_identity"]

FORMAT = "circuitfreeze-statistics-1"


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


class ActivationStatistics(Mapping[int, LayerStatistics]):
    """A mapping from layer to its statistics.

    Saved and loaded as safetensors, so that no pickle is ever read.

    Args:
        layers: the statistics.
        tokens: over how many real tokens.
        identity: what the model is called, see `model_identity`.
        attention: whose they are: `self`, `cross` or `encoder`.
    """

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

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the statistics, with the model's identity, to a safetensors file."""
        tensors = {
            f"{layer}.{role}.{name}": values[role].contiguous()
            for layer, one in self.items()
            for name, values in (("mean", one.mean), ("std", one.std))
            for role in values
        }
        facts = {"format": FORMAT, "tokens": str(self.tokens), "identity": self.identity, "attention": self.attention}
        save_file(tensors, path, facts)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> ActivationStatistics:
        """Reads what `save` wrote.

        Raises:
            InterventionError: the file is not there, or is no file of statistics.
        """
        layers: dict[int, LayerStatistics] = {}
        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except Exception as error:
            raise InterventionError(f"statistics of {path}: cannot be read as safetensors ({error})") from error
        if facts.get("format") != FORMAT:
            raise InterventionError(f"statistics of {path}: format {facts.get('format')!r}, must be {FORMAT!r}")
        try:
            for layer in sorted({int(name.split(".")[0]) for name in tensors}):
                mean, std = ({role: tensors[f"{layer}.{role}.{name}"] for role in ROLES} for name in ("mean", "std"))
                layers[layer] = LayerStatistics(mean, std)
            return cls(layers, int(facts["tokens"]), facts["identity"], facts["attention"])
        except (KeyError, ValueError) as error:
            raise InterventionError(f"statistics of {path}: not what save writes, {error} is amiss") from error


def model_identity(sites: Sites) -> str:
    """A short hash of what the attention layers are: names, shapes, the first and last values of each weight."""
    digest = hashlib.sha256()
    for layer, site in sorted(sites.by_layer.items()):
        digest.update(f"{layer} {type(site.attention).__name__}".encode())
        for name, parameter in site.attention.named_parameters():
            digest.update(f"{name} {list(parameter.shape)}".encode())
            if parameter.is_meta:  # offloaded: its values are not here
                continue
            values = parameter.detach().flatten()
            sample = torch.cat([values[:4], values[-4:]]).to("cpu", torch.float32)
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]
