"""Recordings and statistics that know what they were taken of, so that a judge can take its own of the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from freeze_core import AttentionCircuitFreezer, InterventionConfig
from freeze_core.activations import Recording
from freeze_core.statistics import ActivationStatistics
from pytest_circuitfreeze.origins import remembered

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pytest_circuitfreeze.strategies import Batch

__all__ = ["Calibrated", "Recorded", "calibrated", "moved_to", "recorded"]


class Recorded(Recording):
    """A recording, for `reference=`, of a pass over `source`."""

    def __init__(self, recording: Recording, source: Batch) -> None:
        super().__init__(recording, recording.attention_mask)
        self.source = source

    def __repr__(self) -> str:
        return f"Recorded(layers={list(self)}, source={self.source})"


class Calibrated(ActivationStatistics):
    """Statistics, for `statistics=`, over the real tokens of `sources`."""

    def __init__(self, statistics: ActivationStatistics, sources: Sequence[Batch]) -> None:
        super().__init__(statistics, statistics.tokens, statistics.identity)
        self.sources = list(sources)

    def __repr__(self) -> str:
        return f"Calibrated(layers={list(self)}, sources={self.sources})"


@remembered
def recorded(
    model: PreTrainedModel, source: Batch, layers: Sequence[int] | None = None, attn: str | None = None
) -> Recorded:
    """Records `layers` of the unfrozen model on `source`, under `attn`, by default what the suites run first."""
    from pytest_circuitfreeze.suites.judge.observed_passes import attention_implementation
    from pytest_circuitfreeze.suites.judge.site_lookup import implementations

    with attention_implementation(model, attn or implementations(model)[0]):
        return Recorded(AttentionCircuitFreezer().record(model, source.arguments(model), layers), source)


@remembered
def calibrated(model: PreTrainedModel, sources: Sequence[Batch], layers: Sequence[int] | None = None) -> Calibrated:
    """Statistics of `layers` of the unfrozen model over `sources`, in the same way."""
    from pytest_circuitfreeze.suites.judge.observed_passes import attention_implementation
    from pytest_circuitfreeze.suites.judge.site_lookup import implementations

    batches = [source.arguments(model) for source in sources]
    with attention_implementation(model, implementations(model)[0]):
        statistics = AttentionCircuitFreezer().calibrate(model, batches, layers, progress=False)
    return Calibrated(statistics, sources)


def moved_to(config: InterventionConfig, model: PreTrainedModel) -> InterventionConfig:
    """The same freeze for a copy of the model that it was made for: recorded and calibrated there anew."""
    if isinstance(config.reference, Recorded):
        held = config.reference
        return replace(config, reference=recorded(model, held.source, list(held)))
    if isinstance(config.statistics, Calibrated):
        known = config.statistics
        return replace(config, statistics=calibrated(model, known.sources, list(known)))
    return config
