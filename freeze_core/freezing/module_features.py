"""Where the features of a layer's heads are in the activation of one of its modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from freeze_core.attention.layout import AttentionSite, Storage
from freeze_core.freezing.draws import NoiseTable, accumulation_dtype
from freeze_core.vocabulary import ROLES, Role

__all__ = ["ModuleFeatures", "RolePart", "features_of_projection", "features_of_z"]


class RolePart(NamedTuple):
    """Features of each head of a role, from `start` on, and where in a module they are: an index `[head, feature]`."""

    role: Role
    start: int
    feature_index: Tensor


class ModuleFeatures:
    """The parts of a layer's heads in one module's activation `[batch, token, width]`."""

    def __init__(self, site: AttentionSite, parts: Sequence[RolePart], width: int) -> None:
        self.site = site
        self.parts = parts
        self.width = width

    @property
    def roles(self) -> list[Role]:
        """The roles that have features in the module, each once."""
        return list(dict.fromkeys(part.role for part in self.parts))

    def lay_out(self, values: Mapping[Role, Tensor], x: Tensor) -> Tensor:
        """Values by role `[..., head, head_dim]` at the positions of their features: `[..., width]`, zeros elsewhere.

        Where the module holds more heads than there are values, neighbouring heads share one. Where it holds fewer, the
        heads that share its features have equal values.

        Args:
            x: the activation, whose width, device and dtype the result has (its dtype for accumulation).
        """
        lead = next(iter(values.values())).shape[:-2]
        dtype = accumulation_dtype(x.dtype)
        laid_out = torch.zeros(*lead, x.shape[-1], dtype=dtype, device=x.device)
        for role, start, index in self.parts:
            if role not in values:
                continue
            heads, features = index.shape
            value = values[role][..., start : start + features].to(x.device, dtype)
            given = value.shape[-2]
            value = value.repeat_interleave(heads // given, -2) if heads > given else value[..., :: given // heads, :]
            laid_out[..., index.flatten()] = value.flatten(-2)
        return laid_out

    def noise_tables(self, seed: int) -> dict[Role, NoiseTable]:
        """A table of draws for each role, with as many heads as the model itself has: shared heads share a draw."""
        return {
            role: NoiseTable(
                (seed, self.site.layer, ROLES.index(role)),
                self.site.kv_heads if role in ("k", "v") else self.site.heads,
                self.site.layout.features(role),
            )
            for role in self.roles
        }


def features_of_projection(site: AttentionSite, storage: Storage, module: str) -> ModuleFeatures:
    """The features of q, k and v in the output of the projection called `module`."""
    parts = []
    for role, role_parts in storage.features.items():
        start = 0
        for part in role_parts:
            if part.module == module:
                parts.append(RolePart(role, start, part.features))
            start += part.features.shape[1]
    return ModuleFeatures(site, parts, storage.widths[module])


def features_of_z(site: AttentionSite) -> ModuleFeatures:
    """The features of z in the input of the output projection."""
    return ModuleFeatures(site, [RolePart("z", 0, site.layout.z)], site.layout.z.numel())
