"""`score_heads`: how much each head's circuit matters to a metric."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from freeze_core.activations import Recording
from freeze_core.attention.sites import find_sites
from freeze_core.config import InterventionConfig
from freeze_core.errors import InterventionError, shown
from freeze_core.freezing.install import is_frozen
from freeze_core.scoring.attribution import attribution
from freeze_core.scoring.batches import batches_of
from freeze_core.scoring.distributed import Processes, refuse_sharded
from freeze_core.scoring.exact import exact
from freeze_core.scoring.metrics import metric_of
from freeze_core.scoring.progress import checkpoint_path
from freeze_core.scoring.scores import HeadScores
from freeze_core.scoring.screened import screened
from freeze_core.scoring.sweep import Sweep, circuits_of, interventions
from freeze_core.statistics import ActivationStatistics
from freeze_core.vocabulary import CircuitType, FreezeType, KVScope

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["score_heads"]

METHODS = ("exact", "attribution", "screened")


def score_heads(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Any] | Iterable[Tensor | Mapping[str, Any]],
    metric: str | Callable[..., Any],
    method: str = "exact",
    circuits: Sequence[CircuitType | str] = ("qk", "ov"),
    freeze_type: FreezeType | str = FreezeType.ZERO,
    kv_scope: KVScope | str = KVScope.HEAD,
    positions: str | Sequence[int] = "all",
    *,
    targets: int | Sequence[Any] | Tensor | None = None,
    layers: Sequence[int] | None = None,
    strength: float = 1.0,
    seed: int = 0,
    noise_std: float | None = None,
    statistics: ActivationStatistics | None = None,
    reference: Recording | None = None,
    attention: str = "self",
    ig_steps: int = 0,
    top: int | None = None,
    budget: float | None = None,
    progress: bool = True,
    checkpoint: str | PathLike[str] | None = None,
    distributed: bool | ProcessGroup = False,
) -> HeadScores:
    """The change of a metric when each head's circuit alone is frozen.

    Each score is that of a forward pass of its own under `AttentionCircuitFreezer`, to rounding. What such passes have
    in common is computed once where the clean pass shows that it can be: a pass starts at its frozen layer from what
    the layers before it gave, and what follows the last attention runs at `positions` only. Behind their layer its
    freezes go on together, as rows of one pass, of 256 tokens at most, so that it takes the memory of a batch of so
    many; not where a batch has over 85 tokens, rows are not apart, or anything is drawn. Where layers hand on more than
    they give (keys and values of an earlier layer, layers run again), each pass is a whole one. So it is where the
    model runs code that is not of torch, transformers, PEFT, accelerate or a library of quantisation (hooks, replaced
    forwards, classes of your own): what the clean pass shows of that need not hold for other passes. The model runs as
    it is, in its own mode, without gradients; all passes over a batch draw the same dropout, and torch's generators
    are put back afterwards.

    That is `exact`. `attribution` estimates all of it from the clean pass and its gradient, and one pass for each set
    of activations that some head has frozen (one a circuit under `head`): what a freeze does to the z of its layer,
    softmax and all, times the gradient of the metric there. It is exact where all that comes after z is linear, and
    for a small `strength`; freezes at full strength may do something else altogether, so take it for a first look. With
    `ig_steps` the gradient is the mean over as many points on the straight way from the clean z of the layer to that
    with all of its heads frozen: then the estimates of a layer's heads sum to what freezing them all does, and each
    takes `ig_steps` passes back and forth a layer. `screened` estimates first, then computes exactly the `top` largest
    of each circuit, a few drawn from the others, and those of the others that may be as large as the `top` largest if
    they err by no more than the drawn ones, in the order of their estimates, while the budget lasts. What it found is
    the top for sure only where `HeadScores.rest` is less than its least score, and no head errs by more than the drawn
    ones: of one head drawn like them that is as probable as `HeadScores.confidence`, at least.

    Args:
        model: unfrozen; what it was again afterwards, whatever is raised.
        inputs: token ids `[batch, token]`, a dict of model arguments, or an iterable of either, which is read first.
        metric: of the logits at `positions`, as a built-in one the mean over the positions that are not padding:
            `loss` (cross-entropy of the next token, or of the row's target), `kl` (divergence of the frozen
            distribution from the clean one, in nats), `probability` (of the row's target), `logit_difference` (of the
            row's first target over its second); or a callable `metric(logits)` or `metric(logits, inputs)` that gives
            one number a row for logits `[row, position, word]` and a batch as it was given. What it is handed are
            copies, which it may write to. It must not run `model`. For `loss` the labels among the inputs, or else the
            tokens, are compared as in the model's own loss, with the logits of the position before or, in a masked
            language model, with those of their own; one row is run with labels to see which.
        method: `exact`, `attribution` or `screened`. The latter two need a metric that can be differentiated, and for
            `kl`, which is least in the clean pass, `ig_steps`.
        circuits: `qk`, `ov`, `both`, `q`, `k`, `v`, or `z`, the whole head.
        freeze_type, kv_scope, strength, seed, noise_std, statistics, reference, attention: as in `InterventionConfig`.
        positions: `all`; `last`, the last real token of each row, padded on either side; or columns, padding counted,
            negative ones from the end.
        targets: for a built-in metric one word's id, or one a row over all batches; for `logit_difference` two.
        layers: which to score, negative ones count from the end; `None` is all that have attention.
        ig_steps: of estimates, the points of integrated gradients; 0 is the gradient of the clean pass.
        top: of a screened sweep, how many of the largest scores of each circuit are wanted; `None` is 10.
        budget: of a screened sweep, the share of an exact one that may be run, in layers, the estimates counted (the
            `top` largest estimates are computed whatever it is); `None` is 0.2. Layers are counted as if no freezes
            went on together: on short batches the share of the time is about twice as large.
        progress: show a bar.
        checkpoint: a file to keep what is done in (safetensors; written whole every few seconds, at the end, and
            whatever is raised, `KeyboardInterrupt`, too). The same call goes on from there and gives the same bits as
            without a stop, on the same machine. It is refused to a call that asks anything else (a callable metric is
            told by its qualified name alone), of a model with another config, parameters or clean logits, or of other
            versions of torch, transformers or this package; where passes draw dropout, seed torch's generators as
            before. Each parameter is read for that once.
        distributed: `True` shares the passes among all processes of torch.distributed (torchrun, accelerate launch;
            gloo or nccl), a process group among those of it: each runs the clean passes and, of each layer, its part of
            the others, and each returns the table that one process gives, bit for bit where their products are. All
            must give the same arguments, on models of their own (and seeds, where passes draw), and the first one's
            `checkpoint` counts. What is raised in one is raised in all. `False`, also for a model that is spread over
            processes (tensor parallel), is this process by itself.

    Raises:
        UnsupportedModelError: the model, or one of its heads, cannot be served; a model that is spread over processes
            is given `checkpoint` or `distributed`; or what is frozen reaches the logits by other ways than its
            attention's output, so that it cannot be estimated.
        InterventionError: an argument that cannot be served, before anything is run; what a pass cannot serve; a
            checkpoint that cannot be read or written, or is of another sweep; another process failed; or a
            metric that is to be differentiated has no gradient.
    """
    processes = Processes(distributed, _device(model))
    with processes.reporting():
        if method not in METHODS:
            raise InterventionError(f"method={shown(method)}: must be one of {', '.join(METHODS)}")
        if method != "exact" and (checkpoint is not None or processes.size > 1):
            raise InterventionError(
                f"checkpoint={shown(checkpoint)}, distributed={shown(distributed)}: must be None and False with "
                f"method={method!r}, which is neither kept nor shared out; use method='exact'"
            )
        _check_ig_steps(ig_steps, method, metric)
        _check_screening(top, budget, method)
        if not isinstance(progress, bool):
            raise InterventionError(f"progress={shown(progress)}: must be True or False")
        names = circuits_of(circuits)
        configs = {
            name: InterventionConfig(
                layer_indices=layers,
                circuit="both" if name == "z" else name,
                freeze_type=freeze_type,
                kv_scope=kv_scope,
                strength=strength,
                seed=seed,
                noise_std=noise_std,
                statistics=statistics,
                reference=reference,
                attention=attention,
            )
            for name in names
        }
        sites = find_sites(model, attention=attention)
        if is_frozen(model):
            raise InterventionError("model is frozen: score it unfrozen, so that the clean pass is its own")
        wanted = interventions(sites, configs)
        refuse_sharded(model, processes, checkpoint is not None)
        file = None if checkpoint is None else checkpoint_path(checkpoint)
        batches = batches_of(model, inputs, positions)
        measure = metric_of(metric, targets, batches, model)
        sweep = Sweep(model, sites, batches, measure, wanted, names, progress)
        with torch.inference_mode(False):  # whose tensors do not tell whether they were written to
            if method == "screened":
                found = screened(sweep, ig_steps, 10 if top is None else top, 0.2 if budget is None else budget)
                of_screening = (found.exact, found.rest, found.confidence)
                return HeadScores(found.scores, found.clean, measure.name, method, sweep.rows, *of_screening)
            if method == "attribution":
                scores, clean = attribution(sweep, ig_steps)
            else:
                scores, clean = exact(sweep, file, processes)
        are_exact = {name: ~one.isnan() & (method == "exact") for name, one in scores.items()}
        return HeadScores(scores, clean, measure.name, method, sweep.rows, are_exact)


def _check_screening(top: object, budget: object, method: str) -> None:
    for name, value in (("top", top), ("budget", budget)):
        if value is not None and method != "screened":
            raise InterventionError(
                f"{name}={shown(value)}: must be None with method={method!r}, which screens nothing"
            )
    if top is not None and (isinstance(top, bool) or not isinstance(top, int) or top < 1):
        raise InterventionError(f"top={shown(top)}: must be an int, 1 or more")
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget <= 1):
        raise InterventionError(f"budget={shown(budget)}: must be a number over 0 and at most 1")


def _check_ig_steps(ig_steps: object, method: str, metric: object) -> None:
    if isinstance(ig_steps, bool) or not isinstance(ig_steps, int) or ig_steps < 0:
        raise InterventionError(f"ig_steps={shown(ig_steps)}: must be an int, 0 for the gradient of the clean pass")
    if ig_steps and method == "exact":
        raise InterventionError(f"ig_steps={ig_steps}: must be 0 with method='exact', which estimates nothing")
    if not ig_steps and method != "exact" and metric == "kl":
        raise InterventionError(
            f"metric='kl' is least in the clean pass, where its gradient is 0: method={method!r} sees nothing there; "
            "give ig_steps=1 or more, or use method='exact'"
        )


def _device(model: nn.Module) -> torch.device:
    """Where a model's parameters are, or are loaded to: what processes that use nccl exchange must be there."""
    current = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return next((one.device for one in model.parameters() if one.is_cuda), current)
