"""The passes of a study of patches, pair by pair: both runs as they are, then one pass a patch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from freeze_core.activations import Recording
from freeze_core.attention.layout import Sites
from freeze_core.config import InterventionConfig
from freeze_core.freezing.padding_mask import prompt_of
from freeze_core.freezing.requests import resolve
from freeze_core.generators import Generators
from freeze_core.recording import record
from freeze_core.runs.measuring import logits_at, refuse_equal, refuse_infinite
from freeze_core.runs.pairs import Pair
from freeze_core.scoring.batch_passes import BatchPasses
from freeze_core.scoring.batches import Batch
from freeze_core.scoring.metrics import Metric
from freeze_core.scoring.sweep import interventions
from freeze_core.studies.patch_plan import by_head, by_position

__all__ = ["PatchSweep", "measured"]


@dataclass(frozen=True, eq=False)
class PatchSweep:
    """One sweep of patches.

    Args:
        model: unfrozen.
        sites: its attention layers.
        metric: of the clean prompts.
        configs: of each circuit.
        by: `head` or `position`.
        denoising: whether the clean run is put into the corrupted one, or the other way.
        pairs: what it is run on.
        progress: whether a bar is shown.
    """

    model: nn.Module
    sites: Sites
    metric: Metric
    configs: Mapping[str, InterventionConfig]
    by: str
    denoising: bool
    pairs: Sequence[Pair]
    progress: bool

    @property
    def layers(self) -> list[int]:
        """Those that are patched."""
        return [freeze.layer for freeze in resolve(next(iter(self.configs.values())), self.sites)]

    def counts(self) -> dict[int, int]:
        """How many patches a pair has, by layer.

        Raises:
            CircuitFreezeError: one of them cannot be served.
        """
        if self.by == "head":
            return {layer: len(several) for layer, several in interventions(self.sites, self.configs).items()}
        columns = self.pairs[0].clean.columns + prompt_of(self.sites.stack)
        return dict.fromkeys(self.layers, len(self.configs) * columns)

    def rows(self, number: int, logits: Tensor, clean: Tensor, where: str) -> Tensor:
        """The metric of the rows of pair `number`, `[row]` in float64.

        Args:
            clean: the logits of its clean run.
            where: whose `logits` these are, for errors.
        """
        rows = self.metric.rows(number, self.pairs[number].clean, logits, clean, where)
        refuse_infinite(rows, self.metric.name, number, where)
        return rows


def measured(sweep: PatchSweep, counts: Mapping[int, int]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The metric of each prompt: patched, by circuit `[layer, cell, prompt]`, clean `[prompt]` and corrupted.

    Args:
        counts: how many patches a pair has, by layer.

    Raises:
        InterventionError: it is the same in both runs, or what a pass cannot serve.
    """
    generators, numbers = Generators(sweep.model), range(len(sweep.pairs))
    patched: dict[tuple[str, int, int], list[Tensor]] = defaultdict(list)
    baselines = []
    with generators.restored():
        # Every run of a pair draws from the states in which its unpatched runs start.
        starts, *unpatched = zip(*(_unpatched(sweep, number, generators) for number in numbers), strict=True)
        clean, corrupted = map(torch.cat, unpatched)
        refuse_equal(sweep.metric.name, clean, corrupted, "in the clean and in the corrupted run")
        total = sum(counts.values()) * len(sweep.pairs)
        with tqdm(total=total, desc="patch_activations", unit="patch", disable=not sweep.progress) as bar:
            for number in numbers:
                baseline, cells = _of_pair(sweep, number, counts, starts[number], generators, bar)
                baselines.append(baseline)
                for cell, rows in cells.items():
                    patched[cell].append(rows)
    baseline = torch.cat(baselines)  # made as the patched ones are made
    both = (clean, baseline) if sweep.denoising else (baseline, corrupted)
    return _tables(sweep, {cell: torch.cat(rows) for cell, rows in patched.items()}), *both


def _unpatched(sweep: PatchSweep, number: int, generators: Generators) -> tuple[list[Tensor], Tensor, Tensor]:
    """The states from which a pair draws, and the metric `[row]` of its clean and of its corrupted run."""
    start, pair = generators.states(), sweep.pairs[number]
    with torch.no_grad():
        corrupted = logits_at(sweep.model, pair.corrupted)
        generators.put(start)
        clean = logits_at(sweep.model, pair.clean)
    return start, sweep.rows(number, clean, clean, "clean"), sweep.rows(number, corrupted, clean, "corrupted")


def _of_pair(
    sweep: PatchSweep, number: int, counts: Mapping[int, int], start: list[Tensor], generators: Generators, bar: Any
) -> tuple[Tensor, dict[tuple[str, int, int], Tensor]]:
    """The metric `[row]` of the run that is patched, and under each patch by circuit, layer and cell."""
    pair = sweep.pairs[number]
    into, source = (pair.corrupted, pair.clean) if sweep.denoising else (pair.clean, pair.corrupted)

    def recorded(batch: Batch) -> Recording:
        generators.put(start)
        attention = next(iter(sweep.configs.values())).attention
        return record(sweep.model, batch.arguments, sweep.layers, attention=attention)

    if sweep.by == "head":
        patches = by_head(sweep.sites, sweep.configs, recorded(source))
    else:
        patches = by_position(sweep.sites, sweep.configs, recorded(into), recorded(source))
    generators.put(start)
    with torch.no_grad():
        clean = logits_at(sweep.model, pair.clean) if sweep.denoising else None
    generators.put(start)
    passes = BatchPasses(sweep.model, sweep.sites, into, generators)
    found: dict[tuple[str, int, int], Tensor] = {}
    with passes.running(counts):
        clean = passes.clean if clean is None else clean
        baseline = sweep.rows(number, passes.clean, clean, "unpatched")
        for several in patches:
            freezes = [patch.freeze for patch in several]
            layer = freezes[0].layer
            for patch, logits in zip(several, passes.frozen(layer, freezes, range(len(freezes))), strict=True):
                where = " and ".join(f"{circuit} of {sweep.by} {cell}" for circuit, cell in patch.cells)
                rows = sweep.rows(number, logits, clean, f"with {where} of layer {layer} patched")
                found |= {(circuit, layer, cell): rows for circuit, cell in patch.cells}
                bar.update()
    return baseline, found


def _tables(sweep: PatchSweep, patched: Mapping[tuple[str, int, int], Tensor]) -> dict[str, Tensor]:
    """By circuit `[layer, cell, prompt]`, nan where nothing was patched."""
    cells = 1 + max(cell for _, _, cell in patched)
    if sweep.by == "head":
        cells = max(site.heads for site in sweep.sites.by_layer.values())
    shape = (sweep.sites.layers, cells, sum(pair.clean.rows for pair in sweep.pairs))
    tables = {circuit: torch.full(shape, torch.nan, dtype=torch.float64) for circuit in sweep.configs}
    for (circuit, layer, cell), rows in patched.items():
        tables[circuit][layer, cell] = rows
    return tables
