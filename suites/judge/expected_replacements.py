"""What replacements are made of: statistics of the pass itself, an engine's draws, and clean passes on other inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pytest_circuitfreeze.recordings import Calibrated, Recorded
from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.judge.noise_draws import Draws, noise_of
from pytest_circuitfreeze.suites.judge.observed_passes import attention_implementation, observe
from pytest_circuitfreeze.suites.judge.recorder import Seen
from pytest_circuitfreeze.suites.judge.resampled_rows import distinct_rows, read_orders
from pytest_circuitfreeze.suites.judge.site_lookup import implementations, sites_without_formula
from pytest_circuitfreeze.suites.tolerance import Exact, Nudge
from pytest_circuitfreeze.wrapped import device_of

if TYPE_CHECKING:
    from freeze_core import InterventionConfig
    from pytest_circuitfreeze.engines import Engine

__all__ = ["Clean", "Material", "clean_pass", "material_of"]


class Clean(NamedTuple):
    """A pass of the unfrozen model, as the judge saw it.

    Args:
        runs: what each attention layer consumed, run by run: its parts alone, as their sources gave them.
        real: `[batch, token]` bool, true where a token is not padding.
    """

    runs: Mapping[int, Sequence[Seen]]
    real: Tensor

    def heads(self, layer: int, name: str, run: int = 0) -> Tensor:
        """A part's activation before any norm or rotation, `[batch, token, head, feature]`."""
        return self.runs[layer][run].parts[name].detach()


@dataclass(frozen=True)
class Material:
    """What the replacements of some configs are made of, beyond the frozen pass itself.

    Args:
        noise: the engine's draws.
        orders: by seed, layer and part, which row the engine takes for each, `[head, row]`.
        passes: clean passes over what a reference was recorded on, and statistics were calibrated over, by its id.
    """

    noise: Draws = field(default_factory=dict)
    orders: Mapping[tuple[int, int, str], Tensor] = field(default_factory=dict)
    passes: Mapping[int, Sequence[Clean]] = field(default_factory=dict)

    def replacement(
        self,
        layer: int,
        name: str,
        rows: Sequence[int],
        x: Tensor,
        real: Tensor,
        config: InterventionConfig,
        touch: Nudge | Exact,
        run: int = 0,
    ) -> Tensor:
        """`r`, in float64, broadcastable to an activation, without gradient.

        Args:
            layer, name: whose activation; a role, or a part of one.
            rows: which of the part's heads.
            x: the activation of those heads before any freeze `[batch, token, head, feature]`.
            real: `[batch, token]` bool, true where a token is not padding.
            touch: imitates rounding, for a bound.
            run: which run of the layer in its pass.
        """
        kind, rows, x = str(config.freeze_type), list(rows), x.detach().double()
        if kind == "zero":
            return torch.zeros_like(x)
        if kind == "reference":
            (source,) = self.passes[id(config.reference)]
            return touch(source.heads(layer, name, run)[:, :, rows].double(), 8)
        if kind == "resample":
            order = self.orders[config.seed, layer, name][rows]
            return touch(torch.stack([x[own, :, at] for at, own in enumerate(order)], dim=2), 8)
        if kind == "noise" and config.noise_std is not None:
            return touch(config.noise_std * self._draws(config, layer, name, rows, x), 8)
        if config.statistics is None:
            samples = touch(x[real], int(real.sum()))
        else:
            sources = self.passes[id(config.statistics)]
            samples = torch.cat([source.heads(layer, name, run)[source.real][:, rows].double() for source in sources])
        mean = samples.mean(0)
        if kind == "mean":
            return touch(mean, 8)
        return touch(mean + samples.std(0, correction=0) * self._draws(config, layer, name, rows, x), 8)

    def _draws(self, config: InterventionConfig, layer: int, name: str, rows: Sequence[int], x: Tensor) -> Tensor:
        return self.noise[config.seed, layer, name][: x.shape[1], rows].to(x)


def material_of(
    engine: Engine, model: PreTrainedModel, configs: Sequence[InterventionConfig], batch: Batch
) -> Material:
    """What is needed for the replacements of `configs` on `batch`.

    Raises:
        TypeError: a reference or statistics do not tell what they were taken of.
    """
    orders = {}
    for config in configs:
        if str(config.freeze_type) == "resample":
            layers = None if config.layer_indices is None else list(config.layer_indices)
            apart = distinct_rows(model, len(batch.input_ids), 4)
            for (layer, name), order in read_orders(engine, model, config.seed, apart, layers).items():
                orders[config.seed, layer, name] = order.rows
    passes = {}
    for config in configs:
        for taken in (config.reference, config.statistics):
            if taken is not None:
                passes[id(taken)] = [clean_pass(model, source) for source in _sources(taken)]
    return Material(noise_of(engine, model, configs, batch.input_ids.shape[1]), orders, passes)


def clean_pass(model: PreTrainedModel, source: Batch) -> Clean:
    """The judge's own recording: the unfrozen model on `source`."""
    known = sites_without_formula(model)
    with attention_implementation(model, implementations(model)[0]), torch.no_grad():
        seen = observe(model, model, source, known).runs
    return Clean(seen, source.real.to(device_of(model)))


def _sources(taken: object) -> list[Batch]:
    if isinstance(taken, Recorded):
        return [taken.source]
    if isinstance(taken, Calibrated):
        return taken.sources
    raise TypeError(f"{taken!r} does not say what it was taken of: make it with recorded() or calibrated()")
