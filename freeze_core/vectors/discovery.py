"""Finds an intervention vector in some prompts, and judges it on others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from freeze_core.arguments import check_flag, check_int, is_finite, refuse
from freeze_core.errors import InterventionError, shown
from freeze_core.freezing.draws import accumulation_dtype
from freeze_core.freezing.unfrozen import refuse_frozen
from freeze_core.results.intervals import Resampling
from freeze_core.results.provenance import provenance_of
from freeze_core.scoring.batches import Batch
from freeze_core.scoring.metrics import Metric, metric_of
from freeze_core.vectors.activations import activations
from freeze_core.vectors.checks import check_columns, check_method, check_reached, checked_strengths
from freeze_core.vectors.effects import effects_of
from freeze_core.vectors.methods import CLOSED, mean_difference
from freeze_core.vectors.optimised import optimised
from freeze_core.vectors.positions import Positions
from freeze_core.vectors.prompts import Prompts, digests
from freeze_core.vectors.separation import projections, split_cosines
from freeze_core.vectors.sites import find_residual
from freeze_core.vectors.vector import InterventionVector

__all__ = ["discover_intervention_vector"]

SPLITS = 100
"""How often the prompts are halved for the cosine of the halves; once where a vector is found by gradients."""

LEAST = 4
"""Prompts of each kind: two to find the vector on and to halve, two to judge it on."""


class Rows(NamedTuple):
    """Rows of the positive and of the negative prompts `[row]`, in ascending order."""

    positive: Tensor
    negative: Tensor

    def of(self, inside: Rows) -> Rows:
        """Of these rows those at the places `inside`."""
        return Rows(self.positive[inside.positive], self.negative[inside.negative])


@dataclass(frozen=True, eq=False)
class PromptMetric:
    """A metric of some of the negative prompts."""

    prompts: Prompts
    metric: str | Callable[..., Any]
    targets: Any
    metric_positions: str | Sequence[int]
    model: nn.Module

    def of(self, rows: Tensor) -> tuple[list[Batch], Metric]:
        """The batches of these prompts alone, and the metric of them.

        Raises:
            InterventionError: a metric, targets or positions that cannot be served.
        """
        batches = self.prompts.batches(rows.tolist(), self.metric_positions)
        return batches, metric_of(self.metric, self._targets(rows), batches, self.model)

    def _targets(self, rows: Tensor) -> Any:
        """The targets of these prompts, where each has its own."""
        if self.targets is None or callable(self.metric):
            return self.targets
        try:
            ids = torch.as_tensor(self.targets)
        except (TypeError, ValueError, RuntimeError):
            return self.targets  # which the metric refuses
        if ids.dim() < (2 if self.metric == "logit_difference" else 1):
            return self.targets
        if len(ids) != len(self.prompts):
            raise InterventionError(
                f"targets={shown(self.targets)}: must be those of one prompt for all, or of each of the "
                f"{len(self.prompts)} negative prompts"
            )
        return ids[rows.to(ids.device)]


def discover_intervention_vector(
    model: nn.Module,
    positive: Any,
    negative: Any,
    layer: int,
    method: str = "mean_difference",
    *,
    positions: str | Sequence[int] = "last",
    held_out: float = 0.5,
    seed: int = 0,
    metric: str | Callable[..., Any] | None = None,
    targets: Any = None,
    strengths: Sequence[float] = (1.0,),
    apply_positions: str | Sequence[int] = "all",
    metric_positions: str | Sequence[int] = "last",
    max_norm: float | None = None,
    steps: int | None = None,
    tokenizer: Any = None,
    batch_size: int = 8,
    confidence: float = 0.95,
    resamples: int = 9_999,
    resampling_seed: int = 0,
    progress: bool = True,
) -> InterventionVector:
    """A vector of the residual stream that leads from negative to positive prompts, judged on prompts held out.

    Prompts are split by `seed` into those that the vector is found on and those that it is judged on; where there
    are as many positive as negative ones they are pairs, in order, and split together. What is judged: how well
    projections on the vector tell held-out prompts apart (AUC, accuracy), how alike the vectors of halves of the
    others are, and, with a `metric`, what adding the vector does to it on held-out negative prompts, beside random
    vectors of the same length. The model runs as it is, in its own mode; no parameter, gradient, flag or generator
    of it is touched.

    Args:
        model: unfrozen; what it was again afterwards, whatever is raised.
        positive, negative: token ids `[prompt, token]`, a dict of model arguments (with an `attention_mask` where
            there is padding), an iterable of either, or a list of texts; four of each at least, each once.
        layer: after which decoder layer; negative ones count from the end. That of the last is before the final
            norm.
        method: `mean_difference`; `principal_component`, of pairs' differences, not centred; or `optimised`, by
            gradients: the vector whose adding to negative prompts raises `metric` most (lowers it where it is
            `loss`), as long as `max_norm` at most. See `freeze_core.vectors.methods` and `.optimised`.
        positions: where the stream is read, a prompt's mean over them: `last`, the last real token, `all`, those
            that are not padding, or columns.
        held_out: the share of prompts of each kind that is held out, in (0, 1); two at least, as are left.
        seed: of the split, the halves, the random vectors, and where `optimised` starts.
        metric: of the logits at `metric_positions`, as in `score_heads`.
        targets: of a built-in metric, one prompt's for all, or of each negative prompt.
        strengths: times which the vector is added; distinct finite numbers.
        apply_positions: where it is added, as in `InterventionVector.apply`.
        metric_positions: `all`, `last` or columns.
        max_norm: of `optimised`; `None` is the length of the difference of means.
        steps: of `optimised`; `None` is 50.
        tokenizer: for texts, padded on its side; where positions are learned, right padding leaves them alone.
        batch_size: how many texts are padded to one length and run at once.
        confidence: of intervals, in (0, 1).
        resamples: how often prompts are drawn anew for an interval, and signs for a test.
        resampling_seed: of these draws.
        progress: show a bar while effects are measured.

    Raises:
        UnsupportedModelError: the model cannot be served.
        InterventionError: an argument that cannot be served, before anything is run; or what a pass cannot serve.
        ImportError: scipy is not installed.

    Example:
        >>> vector = ExperimentalInterventions().discover_intervention_vector(  # doctest: +SKIP
        ...     model, glad, sad, layer=12, tokenizer=tokenizer, metric="logit_difference", targets=(good, bad)
        ... )
        >>> print(vector.to_markdown())  # doctest: +SKIP
        >>> with vector.apply(model, strength=2.0):  # doctest: +SKIP
        ...     model.generate(**tokens)
    """
    resampling = Resampling(confidence, resamples, resampling_seed)
    several, where = checked_strengths(strengths), Positions(apply_positions)
    check_int("batch_size", batch_size, 1)
    check_int("seed", seed, 0, below=2**63)
    check_flag("progress", progress)
    check_method(method, metric, targets, max_norm, steps)
    site = find_residual(model, layer)
    check_columns(site, where)
    refuse_frozen(model)
    kinds = [
        Prompts(model, given, name, tokenizer, batch_size)
        for given, name in ((positive, "positive"), (negative, "negative"))
    ]
    paired = len(kinds[0]) == len(kinds[1])
    _check_sizes(kinds, method)
    found, apart = _split([len(kind) for kind in kinds], paired, held_out, seed)
    batches = [
        [kind.batches(rows.tolist(), positions) for kind, rows in zip(kinds, chosen, strict=True)]
        for chosen in (found, apart)
    ]
    _refuse_repeated(batches)
    on_prompts = None
    if metric is not None:
        on_prompts = PromptMetric(kinds[1], metric, targets, metric_positions, model)
        for rows in (found.negative, apart.negative):
            on_prompts.of(rows)  # which refuses what cannot be served, before anything is run
            check_reached(where, kinds[1], rows.tolist())
    with torch.inference_mode(False):
        # First, so that nothing that was measured is lost.
        provenance = provenance_of(model, site.sites, [batch for part in batches for kind in part for batch in kind])
        seen = [activations(model, site, one) for one in batches[0]]
        dtype, difference = _dtype(model), float(mean_difference(*seen).norm())

        def find(inside: Rows, start: int) -> tuple[Tensor, Tensor]:
            """A vector of some of the prompts, and the losses on the way; steps begin elsewhere for each `start`."""
            if method in CLOSED:
                vector = CLOSED[method](seen[0][inside.positive], seen[1][inside.negative])
                return vector.to(dtype), torch.empty(0, dtype=torch.float64)
            assert on_prompts is not None
            return optimised(
                model,
                site,
                *on_prompts.of(found.of(inside).negative),
                where,
                hidden=seen[0].shape[1],
                bound=difference if max_norm is None else float(max_norm),
                steps=50 if steps is None else steps,
                seed=seed,
                start=start,
                dtype=dtype,
            )

        vector, losses = find(Rows(*(torch.arange(len(rows)) for rows in found)), 0)
        _refuse_nothing(vector, method)
        sizes, splits = (len(found.positive), len(found.negative)), SPLITS if method in CLOSED else 1
        cosines = split_cosines(sizes, paired, lambda start, *half: find(Rows(*half), start)[0], seed, splits)
        held = [projections(activations(model, site, one), vector) for one in batches[1]]
        made = InterventionVector(
            vector=vector,
            layer=site.layer,
            method=method,
            found=sizes,
            typical_norm=float(torch.cat(seen).norm(dim=1).mean()),
            held_out=(held[0], held[1]),
            threshold=sum(float(projections(one, vector).mean()) for one in seen) / 2,
            paired=paired,
            cosines=cosines,
            losses=losses,
            effects=None,
            prompts=tuple(one for kind in batches[0] for one in digests(kind)),
            origin=provenance,
            resampling=resampling,
        )
        if on_prompts is None:
            return made
        given, measure = on_prompts.of(apart.negative)
        effects = effects_of(model, site, vector, given, measure, several, where, seed, resampling, progress)
    return replace(made, effects=effects)


def _check_sizes(kinds: Sequence[Prompts], method: str) -> None:
    sizes = [len(kind) for kind in kinds]
    for name, size in zip(("positive", "negative"), sizes, strict=True):
        if size < LEAST:
            raise InterventionError(
                f"{name} has {size} prompt{'s' * (size > 1)}: must have {LEAST} at least, two to find a vector on and "
                "two to hold out, on which it is judged"
            )
    if method == "principal_component" and sizes[0] != sizes[1]:
        raise InterventionError(
            f"positive has {sizes[0]} prompts and negative {sizes[1]}: must be pairs, as many of each and in the same "
            "order, for method='principal_component'; method='mean_difference' needs no pairs"
        )


def _split(sizes: Sequence[int], paired: bool, held_out: object, seed: int) -> tuple[Rows, Rows]:
    """The rows to find a vector on, and those held out: at random, by row alone; pairs stay together."""
    if not is_finite(held_out) or not 0 < held_out < 1:
        refuse("held_out", held_out, "the share of prompts to hold out, in (0, 1)")
    generator = torch.Generator().manual_seed(seed)
    found, apart = [], []
    for number, size in enumerate(sizes):
        if not (paired and number):
            drawn = torch.randperm(size, generator=generator)
        held = min(max(round(float(held_out) * size), 2), size - 2)
        apart.append(drawn[:held].sort().values)
        found.append(drawn[held:].sort().values)
    return Rows(*found), Rows(*apart)


def _refuse_repeated(batches: Sequence[Sequence[Sequence[Batch]]]) -> None:
    """Raises `InterventionError` for a prompt that is there several times, of which one may be held out from others."""
    kinds: list[set[str]] = []
    for name, found, apart in zip(("positive", "negative"), *batches, strict=True):
        every = [*digests(found), *digests(apart)]
        if len(set(every)) < len(every):
            raise InterventionError(
                f"{name} has a prompt several times, which would be found on and judged on: give each once"
            )
        kinds.append(set(every))
    if both := len(set.intersection(*kinds)):
        raise InterventionError(
            f"{both} prompt{'s are' if both > 1 else ' is'} both positive and negative: what tells the kinds apart "
            "cannot be in them, and one that is held out as one kind may be found on as the other; leave them out"
        )


def _dtype(model: nn.Module) -> torch.dtype:
    """Of a vector: float32, or float64 where the model is."""
    return accumulation_dtype(next(one.dtype for one in model.parameters() if one.is_floating_point()))


def _refuse_nothing(vector: Tensor, method: str) -> None:
    if not bool(vector.isfinite().all()) or not bool((vector != 0).any()):
        raise InterventionError(
            f"method={method!r} found a vector that is 0 or not finite: positive and negative prompts do not differ "
            "in the stream there"
        )
