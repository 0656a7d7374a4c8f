"""Which work the passes over one batch may share: experiments that decide it before the first freeze is scored.

A sweep over all heads of a model runs one pass for each freeze. Most of such a pass is known already: up to the frozen
layer it is the clean pass, behind the last attention only the positions that the metric reads count, and the rows of a
batch do not see each other. Four shortcuts follow, each of which is right for most models and wrong for some:

1. **Start at the frozen layer.** Earlier layers give what they gave in the clean pass. Wrong where a layer hands on
   more than it returns (keys and values that a later layer reads, an attribute that a hook sets), where it keeps
   something from one pass for the next, or where something writes to what it returned.
2. **Unembed at the positions only, several passes at once.** Wrong where the unembedding, or what follows it, reads
   other positions or other rows, and where what follows the layers reads something that they did not return.
3. **Run the last layer's MLP at the positions only.** Wrong where it, or what follows it, mixes positions.
4. **Run freezes of one layer as rows of one pass.** Wrong where rows mix: statistics of the batch, capacities of
   experts, a maximum over everything.

No config says which of these hold, and reading code cannot decide it. So each shortcut is tried on the clean pass, and
is taken only if its logits are the clean ones to the rounding of products of other shapes. Agreement alone would prove
little, though: a layer that reads something old agrees as long as the old value is also the right one. Each experiment
therefore spoils, before it compares, whatever the shortcut claims to be irrelevant:

* For 1, one pass runs every layer on negated states. Whatever is kept behind the layers' backs now belongs to another
  pass. Then each layer is run alone, all others replayed, and has to give its clean output again. The last layer goes
  first: running an earlier one might put right what a later one reads. The comparison takes place within the call of
  the layer, before anything that comes later can write to the output. A pass of negated states comes before the
  comparison of logits, too, since what follows the layers may read behind their backs.
* For 2, that pass of other states is unembedded together with the pass that is compared, so that leaks between rows
  show.
* For 3, the other positions are filled with nan while the experiment runs. What depends on them in any way, be it
  multiplied by 0, is nan then. Zeros take the place of nan only afterwards.
* For 4, the clean pass runs as the middle one of three rows. All of the row above is nan. But nan is never the larger
  of two numbers, so a maximum or a threshold over rows would hide it: the row below holds numbers, those of the clean
  pass, negated and in reverse. A model whose buffers are written to (running statistics) does not take part, since nan
  would stay in them for ever.

What follows from agreement is that the shortcut is right for other values too, as long as the code treats all values
alike. Code of torch and transformers does; a hook or a class from elsewhere may not, which is why models that run any
(`freeze_core.scoring.known_code`) share nothing and never come here. Compiled modules do not either: each way of
leaving out layers would be compiled anew.

A pass that lacks something may raise instead of being wrong. Errors (`FAULTS`) therefore count as disagreement; memory
that runs out is no sign of anything and is raised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from freeze_core.errors import CircuitFreezeError
from freeze_core.scoring.batched_freezes import worth_trying
from freeze_core.scoring.layer_cache import LayerCache, RecordLayer, negate_inputs, parts_of
from freeze_core.scoring.patched_calls import run_module
from freeze_core.scoring.shared_passes import PatchedModel, SharedPasses
from freeze_core.scoring.unembedding import CollectStates, ObserveUnembedding

__all__ = ["buffer_versions", "close", "find_shared_passes", "share_rows"]

FAULTS = (CircuitFreezeError, LookupError, TypeError, RuntimeError)
"""What a pass may raise that lacks something of the layers that it leaves out."""


def find_shared_passes(
    model: PatchedModel, cache: LayerCache, unembedding: ObserveUnembedding, clean: Tensor
) -> tuple[SharedPasses, Tensor]:
    """Tries shortcuts 1 to 3: the passes that share most, and the clean logits as these make them.

    Args:
        cache, unembedding: as the clean pass left them.
        clean: its logits at the positions `[row, position, word]`.
    """
    whole = SharedPasses(model)
    observed = unembedding if unembedding.runs == 1 else None
    if not _layers_read_inputs_alone(model, cache, observed):
        return whole, clean
    candidates = [SharedPasses(model, cache)]
    if observed:
        candidates = [SharedPasses(model, cache, observed, fill) for fill in (math.nan, None)] + candidates
    for passes in candidates:
        logits = _agreeing(partial(_logits_after_others, passes), passes, clean)
        if logits is not None:
            return replace(passes, fill=None if passes.fill is None else 0.0), logits
    return whole, clean


def share_rows(passes: SharedPasses, clean: Tensor, freezes: Mapping[int, int]) -> SharedPasses:
    """Tries shortcut 4: the same passes, with freezes of one layer as rows of one pass where rows are independent.

    Args:
        clean: the logits that they give without a freeze.
        freezes: how many the sweep has of each layer.
    """
    model, first = passes.model, min(freezes)
    # An encoder and decoder would run its encoder twice as often, and other arguments cannot be put below each other.
    encodes = bool(getattr(getattr(model.model, "config", None), "is_encoder_decoder", False))
    if not passes.cache or not passes.unembedding or encodes or not model.batch.by_token:
        return passes
    if not worth_trying(freezes, passes.most_rows, len(model.layers)):
        return passes
    output = passes.cache.records[first].output
    above, below = _each_part(output, _nan_like), _each_part(output, _negated_reverse)

    def between_others() -> Tensor:
        return passes.unembed(passes.last_states_of_rows(first, [above, output, below]))[1]

    independent = _agreeing(between_others, passes, clean) is not None
    return replace(passes, rows_are_independent=independent)


def buffer_versions(model: nn.Module) -> list[int]:
    """How often each of the model's buffers was written to (statistics of batches, say)."""
    return [0 if buffer.is_inference() else buffer._version for buffer in model.buffers()]


class CompareLayer:
    """Runs a layer, and compares what it gives with what it gave in the clean pass, which it returns."""

    def __init__(self, record: RecordLayer) -> None:
        self._record = record
        self.agrees = False

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.agrees = _same_tensors(forward(*args, **kwargs), self._record.output)
        return self._record.replay(forward)


def _layers_read_inputs_alone(model: PatchedModel, cache: LayerCache, observed: ObserveUnembedding | None) -> bool:
    """Whether each layer gives what it gave in the clean pass when it alone is run, after a pass of other states."""
    if not all(record.can_be_replayed for record in cache.records):
        return False
    unembedding = CollectStates(observed, model.batch) if observed else run_module
    try:
        model.run([negate_inputs] * len(cache.records), unembedding)
        for number, record in reversed(list(enumerate(cache.records))):
            compared = CompareLayer(record)
            model.run(cache.running_only(number, compared), unembedding)
            if not compared.agrees:
                return False
    except torch.OutOfMemoryError:
        raise
    except FAULTS:
        return False
    return True


def _logits_after_others(passes: SharedPasses) -> Tensor:
    """The logits of a pass that runs the last layer alone, after a pass of other states and unembedded with it."""
    assert passes.cache
    size = len(passes.model.layers)
    ways = [negate_inputs] * size, passes.cache.starting_at(size - 1)
    if passes.at_once == 1:
        return [passes.logits(layers) for layers in ways][1]
    return passes.unembed([passes.last_states(layers) for layers in ways])[1]


def _agreeing(logits: Callable[[], Tensor], passes: SharedPasses, clean: Tensor) -> Tensor | None:
    """The logits, if they are the clean ones to the rounding of products of other shapes."""
    try:
        found = logits()
    except torch.OutOfMemoryError:
        raise
    except FAULTS:
        return None
    bound = _rounding(clean.dtype, passes.unembedding.width if passes.unembedding else 0)
    return found if close(found, clean, bound) else None


def close(found: Tensor, expected: Tensor, bound: float) -> bool:
    """Whether two tensors are the same to `bound` of the largest finite value; nan only where both are."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if torch.equal(found, expected):
        return True
    if not found.is_floating_point():
        return False
    scale = float(torch.where(expected.isfinite(), expected, 0).abs().max())
    return torch.allclose(found, expected, rtol=0, atol=bound * scale, equal_nan=True)


def _rounding(dtype: torch.dtype, terms: int) -> float:
    """What two products of other shapes may differ by, as a share of their largest number.

    Some roundings of a number, and those of its sum: for terms of either sign they are as large as the typical sum
    times the root of their number (N. J. Higham and T. Mary, "A new approach to probabilistic rounding error analysis",
    2019), and are in float32 at least.
    """
    eps = torch.finfo(dtype).eps
    return 8 * eps + math.sqrt(terms) * min(eps, torch.finfo(torch.float32).eps)


def _same_tensors(output: Any, recorded: Any) -> bool:
    found, expected = ([one for one in parts_of(each) if isinstance(one, Tensor)] for each in (output, recorded))
    return len(found) == len(expected) and all(
        close(one, other, 16 * torch.finfo(other.dtype).eps if other.is_floating_point() else 0)
        for one, other in zip(found, expected, strict=True)
    )


def _each_part(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What a layer gave, with each floating-point tensor changed."""
    if type(output) is tuple:
        return tuple(_each_part(part, change) for part in output)
    return change(output) if isinstance(output, Tensor) and output.is_floating_point() else output


def _nan_like(part: Tensor) -> Tensor:
    return torch.full_like(part, torch.nan)


def _negated_reverse(part: Tensor) -> Tensor:
    return -part.flip(-1)
