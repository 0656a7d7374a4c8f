"""Which features of a projection's output belong to which head.

A feature index is an integer tensor `[heads, head_dim]`: entry `[h, d]` is the position, in the projection's
output, of feature `d` of head `h`. With it separate and fused storage, MHA, GQA and MQA are the same code.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from freeze_core.vocabulary import Role

__all__ = ["fused_layout", "plain_layout", "widened"]


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
