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
from freeze_core.scoring.batches import batches_of
from freeze_core.scoring.checkpoint import Checkpoint
from freeze_core.scoring.exact import exact, interventions
from freeze_core.scoring.metrics import metric_of
from freeze_core.scoring.processes import Processes, refuse_spread
from freeze_core.scoring.scores import HeadScores
from freeze_core.statistics import ActivationStatistics
from freeze_core.vocabulary import CircuitType, FreezeType, KVScope

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["score_heads"]

CIRCUITS = (*CircuitType, "z")


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
    progress: bool = True,
    checkpoint: str | PathLike[str] | None = None,
    distributed: bool | ProcessGroup = False,
) -> HeadScores:
    """The change of a metric when each head's circuit alone is frozen.

    Each score is that of a forward pass of its own under `AttentionCircuitFreezer`, to rounding. What such passes have
    in common is computed once where the clean pass shows that it can be: a pass starts at its frozen layer from what
    the layers before it gave, and what follows the last attention runs at `positions` only. Where layers hand on more
    than they give (keys and values of an earlier layer, layers run again), each pass is a whole one. The model runs as
    it is, in its own mode, without gradients; all passes over a batch draw the same dropout, and torch's generators
    are put back afterwards.

    Args:
        model: unfrozen; what it was again afterwards, whatever is raised.
        inputs: token ids `[batch, token]`, a dict of model arguments, or an iterable of either, which is read first.
        metric: of the logits at `positions`, as a built-in one the mean over the positions that are not padding:
            `loss` (cross-entropy of the next token, or of the row's target), `kl` (divergence of the frozen
            distribution from the clean one, in nats), `probability` (of the row's target), `logit_difference` (of the
            row's first target over its second); or a callable `metric(logits)` or `metric(logits, inputs)` that gives
            one number a row for logits `[row, position, word]` and a batch as it was given.
        method: `exact`.
        circuits: `qk`, `ov`, `both`, `q`, `k`, `v`, or `z`, the whole head.
        freeze_type, kv_scope, strength, seed, noise_std, statistics, reference, attention: as in `InterventionConfig`.
        positions: `all`; `last`, the last real token of each row, padded on either side; or columns, padding counted,
            negative ones from the end.
        targets: for a built-in metric one word's id, or one a row over all batches; for `logit_difference` two.
        layers: which to score, negative ones count from the end; `None` is all that have attention.
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
            is given `checkpoint` or `distributed`.
        InterventionError: an argument that cannot be served, before anything is run; what a pass cannot serve; a
            checkpoint that cannot be read or written, or is of another sweep; or another process failed.
    """
    processes = Processes(distributed, _device(model))
    with processes.telling():
        if method != "exact":
            raise InterventionError(f"method={shown(method)}: must be 'exact'")
        if not isinstance(progress, bool):
            raise InterventionError(f"progress={shown(progress)}: must be True or False")
        names = _circuits(circuits)
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
        refuse_spread(model, processes, checkpoint is not None)
        file = None if checkpoint is None else Checkpoint(checkpoint)
        batches = batches_of(model, inputs, positions)
        measure = metric_of(metric, targets, batches, _words(model))
        with torch.inference_mode(False):  # whose tensors do not tell whether they were written to
            scores, clean = exact(model, sites, batches, measure, wanted, names, progress, file, processes)
        return HeadScores(scores, clean, measure.name, method, sum(batch.rows for batch in batches))


def _device(model: nn.Module) -> torch.device:
    """Where a model's parameters are, or are loaded to: what processes that use nccl exchange must be there."""
    current = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return next((one.device for one in model.parameters() if one.is_cuda), current)


def _circuits(circuits: object) -> list[str]:
    allowed = f"a list of distinct ones of {', '.join(CIRCUITS)}"
    if isinstance(circuits, str) or not isinstance(circuits, Sequence) or not circuits:
        raise InterventionError(f"circuits={shown(circuits)}: must be {allowed}")
    if any(not isinstance(one, str) or one not in CIRCUITS for one in circuits) or len(set(circuits)) < len(circuits):
        raise InterventionError(f"circuits={shown(circuits)}: must be {allowed}")
    return [str(one) for one in circuits]


def _words(model: nn.Module) -> int | None:
    """The size of the vocabulary, where the config tells it."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    words = getattr(text, "vocab_size", None)
    return words if isinstance(words, int) else None
