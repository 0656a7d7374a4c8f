"""The ablation study: each circuit of chosen heads frozen in turn, measured over a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from freeze_core.arguments import check_flag, check_int, refuse
from freeze_core.attention.layout import Sites
from freeze_core.config import InterventionConfig, check_fields
from freeze_core.freezing.install import FrozenCircuits, install
from freeze_core.freezing.plan import LayerFreeze
from freeze_core.freezing.unfrozen import unfrozen_sites
from freeze_core.results.intervals import Resampling
from freeze_core.results.provenance import provenance_of
from freeze_core.runs.dataset import batches_in, refuse_single, with_next_tokens
from freeze_core.runs.measuring import measure
from freeze_core.scoring.batches import IGNORED, Batch
from freeze_core.scoring.sweep import circuits_of
from freeze_core.studies.ablation_result import CLEAN, AblationStudy
from freeze_core.studies.head_sets import freezes_of, heads_by_layer
from freeze_core.studies.next_token import Sums, sums
from freeze_core.vocabulary import CircuitType

__all__ = ["run_circuit_ablation_study"]


def run_circuit_ablation_study(
    model: nn.Module,
    dataset: Any,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | Mapping[int, Sequence[int]] | None = None,
    *,
    circuits: Sequence[CircuitType | str] = ("qk", "ov", "both"),
    tokenizer: Any = None,
    batch_size: int = 8,
    confidence: float = 0.95,
    resamples: int = 9_999,
    resampling_seed: int = 0,
    progress: bool = True,
    **fields: Any,
) -> AblationStudy:
    """What freezing each circuit of `heads` in `layers`, all at once, does to the prediction of the next token.

    The model runs as it is, in its own mode, without gradients, once unfrozen and once for each circuit on each
    batch; all passes over a batch draw the same dropout, and torch's generators are put back afterwards.

    Args:
        model: unfrozen; what it was again afterwards, whatever is raised.
        dataset: token ids `[batch, token]`, a dict of model arguments (with an `attention_mask` where there is
            padding), an iterable of either, or a list of texts with their `tokenizer`. Each row is a sequence.
        layers: decoder layers, negative ones count from the end; `None` is all that have attention.
        heads: query heads, in the same way; `None` is all of them. Or those of each layer, `{layer: [heads]}`, and then
            `layers` is `None`.
        circuits: `qk`, `ov`, `both`, `q`, `k`, `v`, or `z`, whole heads; each has a row of the result. Under `zero` at
            full strength `both` is `ov`: where nothing is moved it does not matter where a head looks.
        tokenizer: for texts.
        batch_size: how many texts are padded to one length and run at once.
        confidence: of intervals, in (0, 1).
        resamples: how often sequences are drawn anew for an interval, and signs for a test.
        resampling_seed: of these draws.
        progress: show a bar.
        fields: other fields of `InterventionConfig`: `freeze_type`, `kv_scope`, `strength`, `seed`, `noise_std`,
            `statistics`, `reference`, `attention`.

    Raises:
        UnsupportedModelError: the model, or one of its heads, cannot be served.
        InterventionError: an argument that cannot be served, before anything is run; or what a pass cannot serve.
        ImportError: scipy is not installed.

    Example:
        >>> study = run_circuit_ablation_study(model, texts, [0, 1], [3], tokenizer=tokenizer)  # doctest: +SKIP
        >>> print(study.to_markdown())  # doctest: +SKIP
    """
    check_int("batch_size", batch_size, 1)
    check_flag("progress", progress)
    resampling = Resampling(confidence, resamples, resampling_seed)
    names = circuits_of(circuits)
    taken = {"layer_indices", "head_indices", "circuit", "backward_mode", "preserve_gradients"}
    check_fields(fields, taken, ("layers", "heads", "circuits"))
    config = InterventionConfig(layers, None if isinstance(heads, Mapping) else heads, **fields)
    sites = unfrozen_sites(model, config.attention)
    chosen = heads_by_layer(heads, config, sites) if isinstance(heads, Mapping) else None
    if chosen is not None and layers is not None:
        refuse("layers", layers, "None where heads are a dict from layer to heads")
    freezes = {name: freezes_of(name, config, sites, chosen) for name in names}
    batches = batches_in(model, dataset, tokenizer, batch_size, name="dataset", least=2)
    refuse_single("dataset", sum(batch.rows for batch in batches), "sequence")
    provenance = provenance_of(model, sites, batches)  # first, so that nothing that was measured is lost
    batches = with_next_tokens(model, batches)
    runs = {name: partial(_frozen, sites, several) for name, several in freezes.items()}
    measured = measure(model, batches, CLEAN, runs, _sums, task="ablation study", progress=progress)
    targets = torch.cat([(batch.labels != IGNORED).sum(1) for batch in batches if batch.labels is not None])
    totals = {name: Sums(**values) for name, values in measured.items()}
    return AblationStudy(config, totals, targets, provenance, resampling, chosen)


def _frozen(sites: Sites, freezes: Sequence[LayerFreeze], number: int) -> FrozenCircuits:
    return install([(sites, freezes)])


def _sums(number: int, batch: Batch, logits: Tensor, clean: Tensor, run: str) -> dict[str, Tensor]:
    return sums(batch, logits, clean)._asdict()
