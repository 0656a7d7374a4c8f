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
    """Measures how much a metric changes when each head's circuit alone is frozen.

    `exact` gives what one pass a freeze under `AttentionCircuitFreezer` gives, to rounding. The model runs in its own
    mode, without gradients; all passes over a batch draw the same dropout, and torch's generators are restored.

    Work that passes have in common is shared where the clean pass shows that it can be. A pass starts at its frozen
    layer, with what earlier layers gave in the clean pass. What follows the last attention runs at `positions` only.
    The freezes of one layer go through the later layers as rows of one pass of at most 256 tokens, which takes the
    memory of a batch of that size; not where a batch has over 85 tokens, rows mix, or anything is drawn. Passes are
    whole ones where layers hand on more than they return (keys and values of an earlier layer, layers that run twice),
    where the model is compiled, and where it runs code of other packages than torch, transformers, PEFT, accelerate
    and libraries of quantisation (hooks, replaced forwards, classes of your own), since what the clean pass shows of
    such code need not hold for other passes.

    `attribution` estimates all scores from the clean pass and its gradient, and one pass for each set of activations
    that some head has frozen (one a circuit under `head`). An estimate is the change of z under the freeze, with the
    softmax recomputed, times the gradient of the metric at z. It is exact where everything after z is linear, and for
    a small `strength`. At full strength the true score can be quite different: use it for a first look. With
    `ig_steps` the gradient is the mean over that many points between the clean z of the layer and z with all of its
    heads frozen. The estimates of a layer's heads then sum to the effect of freezing them all; each layer takes
    `ig_steps` passes forward and backward.

    `screened` estimates first. It then computes exactly the `top` largest estimates of each circuit, a few heads drawn
    from the others, and, while the budget lasts, those that could be among the `top` largest if their errors are at
    most those of the drawn heads. The top found is certain only where `HeadScores.rest` is less than its smallest score
    and no head has a larger error than the drawn ones, which holds for one head with the probability
    `HeadScores.confidence`, at least.

    Args:
        model: unfrozen. It is unchanged afterwards, whatever is raised.
        inputs: token ids `[batch, token]`, a dict of model arguments, or an iterable of either, which is read first.
        metric: a built-in one, a mean over those of `positions` that are not padding: `loss` (cross-entropy of the next
            token, or of the row's target), `kl` (divergence of the frozen distribution from the clean one, in nats),
            `probability` (of the row's target), `logit_difference` (of the row's first target over its second). Or a
            callable `metric(logits)` or `metric(logits, inputs)` that gives one number a row for logits
            `[row, position, word]` and a batch as it was given. It gets copies, which it may write to, and must not run
            `model`. `loss` compares logits with the labels among the inputs, or else the tokens, as the model's own
            loss does: those of the next position or, in a masked language model, of the same one. One row is run with
            labels to see which.
        method: `exact`, `attribution` or `screened`. The latter two need a metric that can be differentiated, and for
            `kl`, which is least in the clean pass, `ig_steps`.
        circuits: `qk`, `ov`, `both`, `q`, `k`, `v`, or `z`, the whole head.
        freeze_type, kv_scope, strength, seed, noise_std, statistics, reference, attention: as in `InterventionConfig`.
        positions: `all`; `last`, the last token of each row that is not padding; or columns, padding counted, negative
            ones from the end.
        targets: for a built-in metric one word's id, or one a row over all batches; for `logit_difference` two.
        layers: which to score, negative ones count from the end; `None` is all that have attention.
        ig_steps: of estimates, the points of integrated gradients; 0 is the gradient of the clean pass.
        top: of a screened sweep, how many of the largest scores of each circuit are wanted; `None` is 10.
        budget: of a screened sweep, the share of the layers of an exact one that may be run, estimates counted; the
            `top` largest estimates are computed whatever it is. `None` is 0.2. Layers are counted as if no freezes went
            on together: on short batches the share of the time is about twice as large.
        progress: show a bar.
        checkpoint: a safetensors file for what is done, written every few seconds, at the end, and when anything is
            raised, `KeyboardInterrupt`, too. The same call continues from it, to the same bits on the same machine. Any
            other call is refused: other arguments (a callable metric is identified by its qualified name alone), model
            config, parameters, clean logits, or versions of torch, transformers or this package. Where passes draw
            dropout, seed torch's generators as before. Each parameter is read once for this.
        distributed: `True` shares the passes among all processes of torch.distributed (torchrun, accelerate launch;
            gloo or nccl), a process group among those of it. Each process runs the clean passes and its part of the
            others, and returns the table that one process gives, bit for bit where their products are. All must give
            the same arguments and seeds, on models of their own; the `checkpoint` of the first one counts. An error in
            one is raised in all. `False`, also for a model that is spread over processes (tensor parallel), is this
            process by itself.

    Returns:
        For each circuit `[layer, head]` in float64: the metric frozen minus clean, means over all rows.

    Raises:
        UnsupportedModelError: the model, or one of its heads, is not supported; a model that is spread over processes
            is given `checkpoint` or `distributed`; or a freeze reaches the logits by other ways than the attention's
            output, so that it cannot be estimated.
        InterventionError: an argument is invalid, before anything is run; a pass does not support the freeze; a
            checkpoint cannot be read or written, or is of another sweep; another process failed; or a metric that is to
            be differentiated has no gradient.
    """
    processes = Processes(distributed, _device(model))
    with processes.reporting():
        _check_method(method, ig_steps, metric, top, budget)
        if method != "exact" and (checkpoint is not None or processes.size > 1):
            raise InterventionError(
                f"checkpoint={shown(checkpoint)}, distributed={shown(distributed)}: must be None and False with "
                f"method={method!r}, which is neither kept nor shared out; use method='exact'"
            )
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
        path = None if checkpoint is None else checkpoint_path(checkpoint)
        batches = batches_of(model, inputs, positions)
        sweep = Sweep(model, sites, batches, metric_of(metric, targets, batches, model), wanted, names, progress)
        with torch.inference_mode(False):  # tensors that are made in it do not count writes
            if method == "screened":
                return screened(sweep, ig_steps, 10 if top is None else top, 0.2 if budget is None else budget)
            scores, clean = exact(sweep, path, processes) if method == "exact" else attribution(sweep, ig_steps)
        are_exact = {name: ~one.isnan() & (method == "exact") for name, one in scores.items()}
        return HeadScores(scores, clean, sweep.metric.name, method, sweep.rows, are_exact)


def _check_method(method: str, ig_steps: object, metric: object, top: object, budget: object) -> None:
    """Raises `InterventionError` for an unknown method, or arguments that it does not take."""
    if method not in METHODS:
        raise InterventionError(f"method={shown(method)}: must be one of {', '.join(METHODS)}")
    if isinstance(ig_steps, bool) or not isinstance(ig_steps, int) or ig_steps < 0:
        raise InterventionError(f"ig_steps={shown(ig_steps)}: must be an int, 0 for the gradient of the clean pass")
    if ig_steps and method == "exact":
        raise InterventionError(f"ig_steps={ig_steps}: must be 0 with method='exact', which estimates nothing")
    if not ig_steps and method != "exact" and metric == "kl":
        raise InterventionError(
            f"metric='kl' is least in the clean pass, where its gradient is 0: method={method!r} sees nothing there; "
            "give ig_steps=1 or more, or use method='exact'"
        )
    for name, value in (("top", top), ("budget", budget)):
        if value is not None and method != "screened":
            raise InterventionError(f"{name}={shown(value)}: must be None with method={method!r}; use 'screened'")
    if top is not None and (isinstance(top, bool) or not isinstance(top, int) or top < 1):
        raise InterventionError(f"top={shown(top)}: must be an int, 1 or more")
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget <= 1):
        raise InterventionError(f"budget={shown(budget)}: must be a number over 0 and at most 1")


def _device(model: nn.Module) -> torch.device:
    """Where a model's parameters are, or are loaded to: where messages over nccl have to be."""
    current = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return next((one.device for one in model.parameters() if one.is_cuda), current)
