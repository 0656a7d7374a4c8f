"""What is patched: freezes of one layer that hold what another run recorded there, head by head or column by column."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

from torch import Tensor

from freeze_core.activations import Recording
from freeze_core.attention.layout import Sites
from freeze_core.config import InterventionConfig
from freeze_core.errors import UnsupportedModelError
from freeze_core.freezing.plan import LayerFreeze
from freeze_core.scoring.sweep import interventions
from freeze_core.studies.head_sets import freezes_of, roles_of
from freeze_core.vocabulary import FreezeType, Role

__all__ = ["Patch", "by_head", "by_position"]

LARGEST = 2**26
"""Numbers that composed activations hold at once: 256 MiB in float32."""


class Patch(NamedTuple):
    """One freeze, and the cells of the tables that it is the freeze of: `(circuit, head)` or `(circuit, position)`."""

    freeze: LayerFreeze
    cells: list[tuple[str, int]]


def by_head(sites: Sites, configs: Mapping[str, InterventionConfig], source: Recording) -> Iterator[list[Patch]]:
    """Each head's circuit at all positions, as `source` has it: those of one layer after those of another."""
    for layer in source:
        patching = {name: _recorded(config, layer, source) for name, config in configs.items()}
        yield [Patch(one.freeze, one.heads) for one in interventions(sites, patching)[layer]]


def by_position(
    sites: Sites, configs: Mapping[str, InterventionConfig], own: Recording, source: Recording
) -> Iterator[list[Patch]]:
    """The circuit of all heads of a layer at one position, as `source` has it there: a few at a time.

    At the other positions the reference is what the run itself has, `own`: nothing before the layer is frozen, so that
    the freeze leaves those bit for bit.

    Raises:
        UnsupportedModelError: a layer runs several times, and reads its own patch when it runs again.
    """
    for layer in source:
        if source[layer].q.dim() > 4:
            raise UnsupportedModelError(
                f"layer {layer} runs several times in a pass: when it runs again it has read its patch, so that its "
                "other positions are no longer what was recorded; patch by='head'"
            )
        positions = source[layer].q.shape[-3]
        patches = (
            _at(sites, config, name, _composed(layer, own, source, position, roles_of(name)), position)
            for name, config in configs.items()
            for position in range(positions)
        )
        at_once = max(1, LARGEST // (3 * source[layer].q.numel()))
        while several := list(islice(patches, at_once)):
            yield several


def _at(sites: Sites, config: InterventionConfig, circuit: str, reference: Recording, position: int) -> Patch:
    (layer,) = reference
    (freeze,) = freezes_of(circuit, _recorded(config, layer, reference), sites)
    return Patch(freeze, [(circuit, position)])


def _recorded(config: InterventionConfig, layer: int, reference: Recording) -> InterventionConfig:
    return replace(config, layer_indices=[layer], freeze_type=FreezeType.REFERENCE, reference=reference)


def _composed(layer: int, own: Recording, source: Recording, position: int, roles: tuple[Role, ...]) -> Recording:
    """The activations of `own` in one layer, with those of `source` in `roles` at one position."""

    def composed(role: Role) -> Tensor:
        values: Tensor = getattr(own[layer], role).clone()
        values[..., position, :, :] = getattr(source[layer], role)[..., position, :, :]
        return values

    activations = replace(own[layer], **{role: composed(role) for role in roles})
    return Recording({layer: activations}, own.attention_mask, own.encoder_attention_mask, own.attention)
