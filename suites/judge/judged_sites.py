"""What the judge knows of one attention layer: plain data, made by `known_families` or by `head_discovery`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

if TYPE_CHECKING:
    from pytest_circuitfreeze.suites.judge.attention_formula import Formula

__all__ = ["ROLES", "CannotJudge", "Part", "Role", "Site", "rows_of"]

Role = Literal["q", "k", "v"]
ROLES: tuple[Role, ...] = ("q", "k", "v")


class CannotJudge(AssertionError):
    """The judge's own instruments do not reach this model, so nothing can be said about the engine."""


@dataclass(frozen=True, eq=False)
class Part:
    """What the heads of one role are made of in the output of one linear layer or norm.

    Args:
        role: whose.
        path: the layer's path in the attention module, its source.
        width: features of the source's output.
        features: `[head, feature]`, one row for each set of features, in the order of the first query head that reads
            it; as many rows as the role has heads, or one where all share it.
        readers: the query heads that read each row.
    """

    role: Role
    path: str
    width: int
    features: Tensor
    readers: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Site:
    """One attention layer.

    Args:
        layer: index of the decoder layer.
        layers: number of decoder layers.
        name: path of the attention module in the model.
        module: the attention module.
        output_name: path in the module of what takes z: the output projection, or a norm over all heads before it.
        heads: query heads.
        group: query heads that read one KV head.
        parts: what q, k and v are made of, by a name of their own: the role, where it has one part.
        formula: how the layer attends, where that is known beyond doubt; `None` leaves it to the module itself.
    """

    layer: int
    layers: int
    name: str
    module: nn.Module
    output_name: str
    heads: int
    group: int
    parts: dict[str, Part]
    formula: Formula | None = None

    @property
    def output(self) -> nn.Module:
        """What takes z."""
        return self.module.get_submodule(self.output_name)

    @property
    def sources(self) -> dict[str, nn.Module]:
        """The modules in whose outputs q, k and v are, by their paths in the attention module."""
        return {part.path: self.module.get_submodule(part.path) for part in self.parts.values()}

    def parts_of(self, role: Role) -> list[str]:
        """The parts of one role."""
        return [name for name, part in self.parts.items() if part.role == role]

    def read_at(self, name: str) -> nn.Module:
        """The outermost module that hands on what a part's source gives: it may be wrapped, and frozen there."""
        path = self.parts[name].path
        while "." in path and len(list(self.module.get_submodule(path.rpartition(".")[0]).children())) == 1:
            path = path.rpartition(".")[0]
        return self.module.get_submodule(path)

    def weights(self, read: Callable[[Tensor], Tensor | None] = Tensor.detach) -> dict[str, Tensor]:
        """Each part's weight `[head, feature, input]`, copied from `read(parameter)`."""
        return self._rows("weight", read)

    def biases(self, read: Callable[[Tensor], Tensor | None] = Tensor.detach) -> dict[str, Tensor]:
        """Each part's bias `[head, feature]`, copied from `read(parameter)`; of those that have one."""
        return self._rows("bias", read)

    def _rows(self, kind: str, read: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
        whole = {path: rows_of(source, kind, read) for path, source in self.sources.items()}
        rows = {name: whole[part.path] for name, part in self.parts.items()}
        return {name: found[self.parts[name].features] for name, found in rows.items() if found is not None}

    def moved_to(self, model: nn.Module) -> Site:
        """The same layer of another model that has its modules at the same paths."""
        return replace(self, module=model.get_submodule(self.name))


def rows_of(
    source: nn.Module, kind: str = "weight", read: Callable[[Tensor], Tensor | None] = Tensor.detach
) -> Tensor | None:
    """`read(parameter)` of a linear layer or norm, a view with one row for each feature of its output.

    Args:
        kind: `"weight"` or `"bias"`.
    """
    parameter = getattr(source, kind, None)
    found = None if parameter is None else read(parameter)
    # An adapter gives the weight of the layer that it adapts.
    owner = next((module for module in source.modules() if module._parameters.get(kind) is parameter), source)
    return (
        found.T if found is not None and kind == "weight" and hasattr(owner, "nf") else found
    )  # transformers' Conv1D keeps [in, out]
