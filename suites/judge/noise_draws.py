"""Reads an engine's noise, which is its own choice, by freezing everything to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.judge.observed_passes import run_pass
from pytest_circuitfreeze.suites.judge.site_lookup import sites
from pytest_circuitfreeze.suites.refusals import Refused

if TYPE_CHECKING:
    from freeze_core import InterventionConfig
    from pytest_circuitfreeze.engines import Engine

__all__ = ["Draws", "engine_noise", "noise_of", "read_noise"]

Draws = Mapping[tuple[int, int, str], Tensor]
"""Draws by seed, layer and role (or part of it), `[token, head, head_dim]` with the role's own number of heads."""


def engine_noise(engine: Engine, model: PreTrainedModel, seed: int, columns: int) -> dict[tuple[int, int, str], Tensor]:
    """The draws `e` of one seed: all layers and heads, on one row of `columns` tokens without padding.

    Returns:
        by seed, layer and role, or part of one, `[column, head, head_dim]`, right to the rounding of the model's
        dtype, with as many heads as the role has.
    """
    from freeze_core import InterventionConfig

    batch = Batch.of_tokens(torch.zeros(1, columns, dtype=torch.long))
    config = InterventionConfig(freeze_type="noise", noise_std=1.0, seed=seed)
    try:
        return read_noise(engine, model, config, batch)
    except Refused as refused:
        # Some layer is refused by name: those that are not.
        draws: dict[tuple[int, int, str], Tensor] = {}
        for layer in sites(model):
            with suppress(Refused):
                own = read_noise(engine, model, replace(config, layer_indices=[layer]), batch)
                draws |= {place: draw for place, draw in own.items() if place[1] == layer}
        if not draws:
            raise refused
        return draws


def read_noise(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch, row: int = 0
) -> dict[tuple[int, int, str], Tensor]:
    """What q, k and v are in one row under `config`: the draws, where it freezes to noise of standard deviation 1."""
    found = run_pass(engine, model, config, batch)
    return {
        (config.seed, layer, name): seen.activation(name)[row].double()
        for layer, seen in found.layers.items()
        for name in seen.site.parts
    }


def noise_of(
    engine: Engine, model: PreTrainedModel, configs: Sequence[InterventionConfig], columns: int
) -> dict[tuple[int, int, str], Tensor]:
    """The draws of every seed that `configs` freeze to noise with."""
    draws: dict[tuple[int, int, str], Tensor] = {}
    for seed in {config.seed for config in configs if str(config.freeze_type) == "noise"}:
        draws |= engine_noise(engine, model, seed, columns)
    return draws
