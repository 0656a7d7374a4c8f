"""Activation patching: activations of one run put into another, cell by cell, and what a metric makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from freeze_core.arguments import check_choice, check_flag, check_int, refuse
from freeze_core.config import InterventionConfig
from freeze_core.errors import InterventionError
from freeze_core.freezing.unfrozen import unfrozen_sites
from freeze_core.results.intervals import Resampling
from freeze_core.results.provenance import plain, provenance_of
from freeze_core.runs.pairs import pairs_of
from freeze_core.scoring.metrics import metric_of
from freeze_core.scoring.sweep import circuits_of
from freeze_core.studies.patch_runs import PatchSweep, measured
from freeze_core.studies.patching_result import CELLS, DIRECTIONS, PatchingStudy
from freeze_core.vocabulary import CircuitType, KVScope

__all__ = ["patch_activations"]


def patch_activations(
    model: nn.Module,
    clean: Any,
    corrupted: Any,
    metric: str | Callable[..., Any],
    *,
    by: str = "head",
    circuits: Sequence[CircuitType | str] = ("qk", "ov", "z"),
    direction: str = "denoising",
    targets: int | Sequence[Any] | Tensor | None = None,
    positions: str | Sequence[int] = "last",
    layers: Sequence[int] | None = None,
    kv_scope: KVScope | str = KVScope.HEAD,
    attention: str = "self",
    tokenizer: Any = None,
    batch_size: int = 8,
    confidence: float = 0.95,
    resamples: int = 9_999,
    resampling_seed: int = 0,
    progress: bool = True,
) -> PatchingStudy:
    """Patches each head, or each position of each layer, with what it is in the run on the paired prompts.

    `denoising` puts activations of the clean run into the corrupted one, and asks what is enough to restore the metric;
    `noising` puts those of the corrupted run into the clean one, and asks what it needs: S. Heimersheim and N. Nanda,
    "How to use and interpret activation patching", 2024; F. Zhang and N. Nanda, "Towards Best Practices of Activation
    Patching in Language Models: Metrics and Methods", 2023. Each patch is a freeze of type `reference` in a pass of its
    own, which starts at its layer where the unpatched pass shows that it can. The model runs as it is, in its own mode,
    without gradients; all passes over a pair draw the same dropout, and torch's generators are put back afterwards.

    Args:
        model: unfrozen; what it was again afterwards, whatever is raised.
        clean: token ids `[prompt, token]`, a dict of model arguments, an iterable of either, or a list of texts with
            their `tokenizer`; each row is a prompt, and there are two at least.
        corrupted: in the same way, prompt by prompt of as many tokens, padded alike.
        metric: as for `score_heads`, of the run that is patched, whichever it is, as an answer to the clean prompts:
            their next tokens are those of `loss`, their batch is what a callable is given as `inputs`, and `kl` is the
            divergence from the clean run's distribution.
        by: `head` patches one head at all positions, `position` all heads of a layer at one position, padding counted
            (the tokens of a row there may be padding, on which nothing depends).
        circuits: what is patched of them: `qk`, `ov`, `both`, `q`, `k`, `v`, or `z`, the whole head.
        direction: `denoising` or `noising`.
        targets: as for `score_heads`.
        positions: of the logits that the metric is handed: `last`, `all` or columns, as for `score_heads`.
        layers: decoder layers, negative ones count from the end; `None` is all that have attention.
        kv_scope: of a head alone, as in `InterventionConfig`.
        attention: `self`, `cross` or `encoder`; by position `self` alone.
        tokenizer: for texts.
        batch_size: how many texts are padded to one length and run at once.
        confidence: of intervals, in (0, 1).
        resamples: how often prompts are drawn anew for an interval.
        resampling_seed: of these draws.
        progress: show a bar.

    Raises:
        UnsupportedModelError: the model, or one of its heads, cannot be served; by position no layer that runs several
            times in a pass.
        InterventionError: an argument that cannot be served, before anything is run; a metric that is the same in both
            runs, so that there is nothing to restore or to break; or what a pass cannot serve.
        ImportError: scipy is not installed.

    Example:
        >>> study = patch_activations(  # doctest: +SKIP
        ...     model, clean_ids, corrupted_ids, "logit_difference", targets=(paris, rome)
        ... )
        >>> study.normalised["z"].value  # [layer, head]: 0 as corrupted, 1 as clean  # doctest: +SKIP
        >>> print(study.to_markdown(top=10))  # doctest: +SKIP
    """
    check_choice("by", by, CELLS)
    check_choice("direction", direction, DIRECTIONS)
    check_int("batch_size", batch_size, 1)
    check_flag("progress", progress)
    resampling = Resampling(confidence, resamples, resampling_seed)
    configs = {
        name: InterventionConfig(
            layers, circuit="both" if name == "z" else name, kv_scope=kv_scope, attention=attention
        )
        for name in circuits_of(circuits)
    }
    if by == "position" and attention != "self":
        refuse("attention", attention, "'self' with by='position': other attention has columns of its own")
    sites = unfrozen_sites(model, attention)
    pairs = pairs_of(model, clean, corrupted, tokenizer, batch_size, positions, "clean")
    columns = sorted({pair.clean.columns for pair in pairs})
    if by == "position" and len(columns) > 1:
        raise InterventionError(f"clean has batches of {columns} columns: must all have as many with by='position'")
    measure = metric_of(metric, targets, [pair.clean for pair in pairs], model)
    sweep = PatchSweep(model, sites, measure, configs, by, direction == "denoising", pairs, progress)
    counts = sweep.counts()
    provenance = provenance_of(model, sites, [batch for pair in pairs for batch in pair])  # before anything can be lost
    with torch.inference_mode(False):  # whose tensors do not tell whether they were written to
        values = measured(sweep, counts)
    settings = {
        "metric": measure.name,
        "by": by,
        "circuits": list(configs),
        "direction": direction,
        "targets": plain(targets),
        "positions": plain(positions),
        "layers": plain(layers),
        "kv_scope": str(next(iter(configs.values())).kv_scope),
        "attention": attention,
    }
    return PatchingStudy(*values, settings, provenance, resampling)
