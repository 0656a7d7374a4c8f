"""The linear maps of one head: to its q, k and v, and from its z."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from freeze_core.attention.layout import AttentionSite, Part, Sites
from freeze_core.circuits.linear import Affine, affine
from freeze_core.circuits.norms import folded
from freeze_core.circuits.observing import Flow, source_of
from freeze_core.errors import UnsupportedModelError
from freeze_core.vocabulary import Role

__all__ = ["layer_around", "norm_before", "reading_map", "writing_map"]


def layer_around(model: nn.Module, sites: Sites, site: AttentionSite) -> nn.Module:
    """The decoder layer around an attention module: the innermost that a list holds."""
    name = sites.names[site.layer]
    while name and not isinstance(model.get_submodule(name.rpartition(".")[0]), nn.ModuleList):
        name = name.rpartition(".")[0]
    return model.get_submodule(name)


def reading_map(
    site: AttentionSite, head: int, role: Role, flows: Mapping[nn.Module, Flow], norm: nn.Module | None
) -> Affine:
    """The map from what the attention takes, or from what `norm` takes, over its rms, to a head's q, k or v.

    Args:
        flows: of the modules in the layer.

    Raises:
        UnsupportedModelError: there is none.
    """
    parts = [_of_part(site, head, role, part, flows) for part in site.layout.shared.features[role]]
    found = Affine(*(torch.cat(pieces, -1) for pieces in zip(*parts, strict=True)))
    return found if norm is None else folded(norm, flows[norm].taken[0], found)


def norm_before(site: AttentionSite, role: Role, flows: Mapping[nn.Module, Flow]) -> nn.Module | None:
    """The module in the layer that gives what the attention takes for `role`."""
    return source_of(_taken(site, site.layout.shared.features[role][0], flows), flows)


def writing_map(site: AttentionSite, head: int, flows: Mapping[nn.Module, Flow]) -> Affine:
    """The map from a head's z to what the output projection gives.

    Raises:
        UnsupportedModelError: it is not linear.
    """
    module = site.layout.output
    if module not in flows:
        raise UnsupportedModelError(f"the output projection of {site.name} does not run on drawn tokens")
    taken = flows[module].taken[0]
    _refuse_shard(site, "the output projection", taken, site.layout.z.numel())
    return affine(module, taken, None, site.layout.z[head])


def _of_part(site: AttentionSite, head: int, role: Role, part: Part, flows: Mapping[nn.Module, Flow]) -> Affine:
    module, taken = site.layout.shared.modules[part.module], _taken(site, part, flows)
    if not any(taken.shape == one.shape and torch.equal(taken, one) for one in flows[site.attention].taken):
        raise UnsupportedModelError(
            f"{part.module} of {site.name}, a {type(module).__name__}, reads something else than what the attention is "
            f"given (a latent, or what a norm over all heads takes): {role} has no matrix of the hidden states"
        )
    _refuse_shard(site, part.module, flows[module].given, site.layout.shared.widths[part.module])
    return affine(module, taken, part.features[head * len(part.features) // site.heads])


def _taken(site: AttentionSite, part: Part, flows: Mapping[nn.Module, Flow]) -> Tensor:
    module = site.layout.shared.modules[part.module]
    if module not in flows:
        raise UnsupportedModelError(f"{part.module} of {site.name} does not run on drawn tokens")
    return flows[module].taken[0]


def _refuse_shard(site: AttentionSite, name: str, seen: Tensor, width: int) -> None:
    if seen.shape[-1] != width:
        raise UnsupportedModelError(
            f"{name} of {site.name} has {seen.shape[-1]} features where {width} were expected: under tensor "
            "parallelism a process has its own heads only; look at a model that is whole"
        )
