"""Sets of heads: query heads by layer, and the freezes of one of their circuits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from freeze_core.arguments import refuse
from freeze_core.attention.layout import Sites
from freeze_core.config import InterventionConfig
from freeze_core.errors import InterventionError, shown
from freeze_core.freezing.plan import LayerFreeze
from freeze_core.freezing.requests import resolve
from freeze_core.vocabulary import CircuitType, Role

__all__ = ["freezes_of", "heads_by_layer", "roles_of"]


def heads_by_layer(heads: object, config: InterventionConfig, sites: Sites) -> dict[int, list[int]]:
    """Query heads of each layer, `{layer: [heads]}`, all counted from the start and in order.

    Raises:
        InterventionError: no such mapping, or a layer or a head that is not there or is named twice.
    """
    if not isinstance(heads, Mapping) or not heads:
        refuse("heads", heads, "a dict from layer to a list of heads, not empty")
    chosen: dict[int, list[int]] = {}
    for layer, several in heads.items():
        (freeze,) = resolve(replace(config, layer_indices=[layer], head_indices=several), sites)
        if freeze.layer in chosen:
            raise InterventionError(f"heads={shown(dict(heads))}: names the same layer twice")
        chosen[freeze.layer] = sorted(freeze.heads)
    return dict(sorted(chosen.items()))


def roles_of(circuit: str) -> tuple[Role, ...]:
    """The activations that a circuit consists of; `z` is the whole head."""
    return ("z",) if circuit == "z" else CircuitType(circuit).roles


def freezes_of(
    circuit: str, config: InterventionConfig, sites: Sites, heads: Mapping[int, Sequence[int]] | None = None
) -> list[LayerFreeze]:
    """The freezes of a circuit of `heads` by layer; `None` is those that the config names."""
    configs = [config]
    if heads is not None:
        chosen = {layer: several for layer, several in heads.items() if several}
        configs = [replace(config, layer_indices=[layer], head_indices=several) for layer, several in chosen.items()]
    return [freeze for one in configs for freeze in resolve(one, sites, roles_of(circuit))]
