"""Whether a set of heads is a circuit: what a metric keeps of it when these heads alone are left, or are taken away."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from freeze_core.attention.sites import Sites, find_sites
from freeze_core.config import InterventionConfig
from freeze_core.errors import InterventionError, shown
from freeze_core.freezing.install import is_frozen
from freeze_core.freezing.plan import LayerFreeze, refuse_dependent, resolve
from freeze_core.generators import Generators
from freeze_core.recording import record
from freeze_core.scoring.batch_passes import BatchPasses
from freeze_core.scoring.batches import Batch
from freeze_core.scoring.metrics import Metric, metric_of
from freeze_core.scoring.sweep import circuits_of
from freeze_core.statistics import ActivationStatistics, digest_of
from freeze_core.studies.checks import check_batch_size, check_progress, heads_by_layer, refuse_equal, refuse_infinite
from freeze_core.studies.faithful import RUNS, Faithfulness
from freeze_core.studies.intervals import Resampling
from freeze_core.studies.origin import origin_of
from freeze_core.studies.pairs import pairs_of, prompts
from freeze_core.studies.patches import roles_of
from freeze_core.vocabulary import CircuitType, FreezeType, KVScope

__all__ = ["measure_faithfulness"]


def measure_faithfulness(
    model: nn.Module,
    inputs: Any,
    heads: Mapping[int, Sequence[int]],
    metric: str | Callable[..., Any],
    *,
    circuit: CircuitType | str = "z",
    freeze_type: FreezeType | str = FreezeType.MEAN,
    corrupted: Any = None,
    statistics: ActivationStatistics | None = None,
    kv_scope: KVScope | str = KVScope.HEAD,
    strength: float = 1.0,
    seed: int = 0,
    noise_std: float | None = None,
    attention: str = "self",
    targets: int | Sequence[Any] | Tensor | None = None,
    positions: str | Sequence[int] = "last",
    tokenizer: Any = None,
    batch_size: int = 8,
    confidence: float = 0.95,
    resamples: int = 9_999,
    resampling_seed: int = 0,
    progress: bool = True,
) -> Faithfulness:
    """How much of what the model does a set `C` of heads does alone, and how much is left without it.

    The metric `m` is taken of the model `M` as it is, with the circuit of all heads frozen (the empty set), with all
    heads frozen but those of `C`, and with those of `C` frozen (`M` without `C`):

        faithfulness = (m(C) - m(empty)) / (m(M) - m(empty))
        completeness = (m(M without C) - m(empty)) / (m(M) - m(empty))

    A faithful circuit has a faithfulness near 1. A complete one leaves nothing that does the same: its completeness is
    near 0. S. Marks, C. Rager, E. J. Michaud, Y. Belinkov, D. Bau and A. Mueller, "Sparse Feature Circuits", 2024;
    after K. Wang, A. Variengien, A. Conmy, B. Shlegeris and J. Steinhardt, "Interpretability in the Wild", 2022, whose
    completeness compares the two under removal of every part of `C`, where this is of all of it. Both are ratios of
    means over prompts. The model runs as it is, in its own mode, without gradients; all passes over a batch draw the
    same dropout, and torch's generators are put back afterwards.

    Args:
        model: unfrozen; what it was again afterwards, whatever is raised.
        inputs: token ids `[prompt, token]`, a dict of model arguments, an iterable of either, or a list of texts with
            their `tokenizer`; each row is a prompt, and there are two at least.
        heads: `C`, the query heads of each layer, `{layer: [heads]}`; negative indices count from the end.
        metric: as for `score_heads`; `kl` is the divergence from the unfrozen model's distribution.
        circuit: what is frozen of heads: `z`, the whole head, or `qk`, `ov`, `both`, `q`, `k`, `v`.
        freeze_type, statistics, strength, seed, noise_std, attention: as in `InterventionConfig`. Of `mean` without
            calibrated `statistics` the means are those of each pass, batch by batch.
        corrupted: for `reference`, and for it alone: prompts paired with `inputs`, of as many tokens, padded alike, at
            whose activations heads are frozen.
        kv_scope: as in `InterventionConfig`; under `group` K and V of heads that share them are frozen with either set.
        targets, positions: as for `score_heads`; `last` is the logits of the last real token of each prompt.
        tokenizer: for texts.
        batch_size: how many texts are padded to one length and run at once.
        confidence: of intervals, in (0, 1).
        resamples: how often prompts are drawn anew for an interval.
        resampling_seed: of these draws.
        progress: show a bar.

    Raises:
        UnsupportedModelError: the model, or one of its heads, cannot be served.
        InterventionError: an argument that cannot be served, before anything is run; a metric that freezing all heads
            does not change, so that there is nothing to keep; or what a pass cannot serve.
        ImportError: scipy is not installed.

    Example:
        >>> found = measure_faithfulness(  # doctest: +SKIP
        ...     model, ids, {3: [1, 5], 7: [2]}, "logit_difference", targets=answers, statistics=statistics
        ... )
        >>> found.faithfulness, found.completeness  # each a value with its interval  # doctest: +SKIP
    """
    check_batch_size(batch_size)
    check_progress(progress)
    resampling = Resampling(confidence, resamples, resampling_seed)
    (name,) = circuits_of([circuit])
    references = _check_freeze_type(freeze_type, corrupted)
    config = InterventionConfig(
        circuit="both" if name == "z" else name,
        freeze_type=FreezeType.ZERO if references else freeze_type,  # until there is a reference, which is recorded
        statistics=statistics,
        kv_scope=kv_scope,
        strength=strength,
        seed=seed,
        noise_std=noise_std,
        attention=attention,
    )
    sites = find_sites(model, attention=config.attention)
    if is_frozen(model):
        raise InterventionError("model is frozen: measure it unfrozen, so that the clean pass is its own")
    sets = _sets(heads, sites, config)
    if references:
        pairs = pairs_of(model, inputs, corrupted, tokenizer, batch_size, positions, "inputs")
        batches, others = [pair.clean for pair in pairs], [pair.corrupted for pair in pairs]
    else:
        batches, others = prompts(model, inputs, tokenizer, batch_size, positions, "inputs"), []
    measure = metric_of(metric, targets, batches, model)
    question = _Question(model, sites, config, name, sets, measure)
    question.refuse_dependent()
    origin = origin_of(model, sites, [*batches, *others])  # first, so that nothing that was measured is lost
    if statistics is not None:
        origin["statistics"] = digest_of(statistics.tensors().values())
    with torch.inference_mode(False):
        values = _measured(question, batches, others, progress)
    refuse_equal(measure.name, values["model"], values["empty"], "both unfrozen and with all heads frozen")
    settings = {
        "heads": sets["complement"],
        "metric": measure.name,
        "circuit": name,
        "freeze_type": str(FreezeType.REFERENCE if references else config.freeze_type),
        "kv_scope": str(config.kv_scope),
        "strength": float(config.strength),
        "seed": int(config.seed),
        "noise_std": config.noise_std,
        "attention": attention,
        "targets": None if targets is None else torch.as_tensor(targets).tolist(),
        "positions": positions if isinstance(positions, str) else [int(one) for one in positions],
    }
    return Faithfulness(values, settings, sum(map(len, sets["empty"].values())), origin, resampling)


def _check_freeze_type(freeze_type: object, corrupted: object) -> bool:
    """Whether what is frozen is held at what it is on corrupted prompts."""
    references = isinstance(freeze_type, str) and freeze_type == FreezeType.REFERENCE
    if references and corrupted is None:
        raise InterventionError("corrupted=None: freeze_type 'reference' needs prompts, paired with inputs")
    if not references and corrupted is not None:
        raise InterventionError(f"corrupted: must be None under freeze_type {shown(freeze_type)}, which uses none")
    return references


def _sets(heads: object, sites: Sites, config: InterventionConfig) -> dict[str, dict[int, list[int]]]:
    """The heads of each layer that are frozen, by run."""
    chosen = heads_by_layer(heads, config, sites)
    every = {freeze.layer: list(freeze.heads) for freeze in resolve(config, sites)}
    rest = {layer: [head for head in several if head not in chosen.get(layer, [])] for layer, several in every.items()}
    return dict(zip(RUNS, ({}, every, rest, chosen), strict=True))


@dataclass(frozen=True, eq=False)
class _Question:
    """What is measured: which circuit of which heads is frozen in each run, and by which metric."""

    model: nn.Module
    sites: Sites
    config: InterventionConfig
    circuit: str
    sets: Mapping[str, Mapping[int, Sequence[int]]]
    metric: Metric

    def freezes(self, run: str, config: InterventionConfig) -> list[LayerFreeze]:
        """Those of one run."""
        return [
            freeze
            for layer, heads in self.sets[run].items()
            if heads
            for freeze in resolve(
                replace(config, layer_indices=[layer], head_indices=heads), self.sites, roles_of(self.circuit)
            )
        ]

    def refuse_dependent(self) -> None:
        """Raises `UnsupportedModelError` where heads that are frozen cannot be told from others."""
        for run in RUNS:
            for freeze in self.freezes(run, self.config):
                refuse_dependent(self.sites.by_layer[freeze.layer], [freeze])


def _measured(
    question: _Question, batches: Sequence[Batch], others: Sequence[Batch], progress: bool
) -> dict[str, Tensor]:
    """The metric `[prompt]` of each run."""
    generators = Generators(question.model)
    before = generators.states()
    found: dict[str, list[Tensor]] = {run: [] for run in RUNS}
    try:
        with tqdm(
            total=len(batches) * len(RUNS), desc="measure_faithfulness", unit="pass", disable=not progress
        ) as bar:
            for number, batch in enumerate(batches):
                config = _config(question, others[number], generators) if others else question.config
                passes = BatchPasses(question.model, question.sites, batch, generators)
                with passes.running({}):
                    for run in RUNS:
                        freezes = question.freezes(run, config)
                        logits = passes.whole(freezes) if run != RUNS[0] else passes.clean
                        rows = question.metric.rows(number, batch, logits, passes.clean, run)
                        found[run].append(refuse_infinite(rows, question.metric.name, number, run))
                        bar.update()
    finally:
        generators.put(before)
    return {run: torch.cat(rows) for run, rows in found.items()}


def _config(question: _Question, corrupted: Batch, generators: Generators) -> InterventionConfig:
    """The config that freezes at what is recorded on `corrupted`; the generators are left as they were."""
    start, config = generators.states(), question.config
    recording = record(question.model, corrupted.arguments, list(question.sets["empty"]), attention=config.attention)
    generators.put(start)
    return replace(config, freeze_type=FreezeType.REFERENCE, reference=recording)
