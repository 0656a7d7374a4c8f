"""Where the attention layers of a model are, and which features of a projection's output belong to which head.

A feature index is an integer tensor `[heads, head_dim]`: entry `[h, d]` is the position, in the projection's
output, of feature `d` of head `h`. With it separate and fused storage, MHA, GQA and MQA are the same code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from freeze_core.vocabulary import ModelArchitecture, Role

__all__ = ["AttentionSite", "Layout", "Part", "Sites", "Storage", "fused_layout", "plain_layout", "widened"]


class Part(NamedTuple):
    """Some features of each head: an index `[heads, features]` into the output of the module called `module`."""

    module: str
    features: Tensor


@dataclass(frozen=True, eq=False)
class Storage:
    """One way in which an attention layer can hold its q, k and v.

    Args:
        modules: the modules whose outputs hold q, k and v, by name.
        widths: the number of features of each of those outputs.
        features: for each role the parts that a head's features are made of, in their order. A part with fewer heads
            than there are query heads is shared by neighbouring ones.
        sources: for each module whose output is widened, the feature `[wide features]` that each one repeats.
        attributes: what the attention module's attributes must be for its own code to read this storage.
        readers: attention modules of later layers that read the same keys and values, and so have the same attributes.
    """

    modules: Mapping[str, nn.Module]
    widths: Mapping[str, int]
    features: Mapping[Role, tuple[Part, ...]]
    sources: Mapping[str, Tensor] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    readers: tuple[nn.Module, ...] = ()


@dataclass(frozen=True, eq=False)
class Layout:
    """Head counts and storages of one attention module.

    `shared` is the storage that the model came with. `unshared` has one KV head for each query head; it is `None` where
    nothing is shared, or where the module's code has no such path. z is the input of `output`. `core` is the module
    whose attributes the code reads: the attention module, or the part of it that holds the projections.
    """

    architecture: ModelArchitecture
    heads: int
    kv_heads: int
    head_dim: int
    output: nn.Module
    core: nn.Module
    shared: Storage
    unshared: Storage | None = None

    @property
    def z(self) -> Tensor:
        """Feature index `[heads, value_dim]` into the input of the output projection."""
        return plain_layout(self.heads, self.features("v"))

    def features(self, role: Role) -> int:
        """Features of a head of this role."""
        return sum(part.features.shape[1] for part in self.shared.features["v" if role == "z" else role])


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """One attention layer: where it is, whether `self` or `cross`, and how it stores what its heads read and write."""

    layer: int
    kind: str
    name: str
    attention: nn.Module
    layout: Layout

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.layout.heads

    @property
    def kv_heads(self) -> int:
        """KV heads."""
        return self.layout.kv_heads

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True, eq=False)
class Sites:
    """The attention layers of one model.

    Args:
        model: the model, as it was handed over.
        layers: number of decoder layers, attention or not; indices count these.
        stack: the module around the decoder layers that sees each pass's tokens, mask and cache.
        stack_name: its path in the model.
        composite: the module that runs the stack as a part of itself and may make other masks of a padding mask first.
        by_layer: the attention layers that can be served.
        names: the paths of their attention modules in the model.
        refused: why others cannot, by layer. A layer in neither has no attention.
        encoder_decoder: where the stack is the encoder's of an encoder-decoder, the module that takes
            `encoder_outputs`, and the one inside it that computes them.
    """

    model: nn.Module
    layers: int
    stack: nn.Module
    stack_name: str
    composite: nn.Module | None
    by_layer: Mapping[int, AttentionSite]
    names: Mapping[int, str]
    refused: Mapping[int, str]
    encoder_decoder: tuple[nn.Module, nn.Module] | None = None

    def path(self, site: AttentionSite) -> str:
        """The path of a site's attention module within the stack, whichever module the model was entered by."""
        prefix = f"{self.stack_name}." if self.stack_name else ""
        return self.names[site.layer].removeprefix(prefix)


def plain_layout(heads: int, head_dim: int) -> Tensor:
    """Feature index `[heads, head_dim]` of a projection that holds one role, head after head."""
    return torch.arange(heads * head_dim).view(heads, head_dim)


def fused_layout(
    heads: int,
    kv_heads: int,
    head_dim: int,
    blocks: int = 1,
    order: tuple[Role, Role, Role] = ("q", "k", "v"),
) -> dict[Role, Tensor]:
    """Feature index of each role in a fused projection stored as equal `blocks`, each in `order`.

    Every layout in use is one of these: all queries, then all keys, then all values is one block; per head
    (query, key, value) is a block a head; per group (its queries, its key, its value) is a block a KV head.

    Args:
        heads: query heads.
        kv_heads: heads of keys and of values.
        head_dim: features a head.
        blocks: divides `heads` and `kv_heads`.
        order: of the roles within a block.
    """
    sizes: dict[Role, int] = {"q": heads // blocks, "k": kv_heads // blocks, "v": kv_heads // blocks}
    slots = torch.arange(blocks * sum(sizes.values()) * head_dim).view(blocks, -1, head_dim)
    layout: dict[Role, Tensor] = {}
    start = 0
    for role in order:
        layout[role] = slots[:, start : start + sizes[role]].reshape(-1, head_dim)
        start += sizes[role]
    return layout


def widened(shared: Mapping[Role, Tensor], wide: Mapping[Role, Tensor]) -> Tensor:
    """Where each feature of the layout `wide` comes from in the layout `shared`: `[wide features]`.

    Roles that have more heads in `wide` are repeated, so that query head `h` finds its KV head `h // group`.
    """
    source = torch.empty(sum(index.numel() for index in wide.values()), dtype=torch.long)
    for role, index in wide.items():
        group = index.shape[0] // shared[role].shape[0]
        source[index] = shared[role].repeat_interleave(group, dim=0)
    return source
