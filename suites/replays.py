"""Compares what a frozen layer gave with what the unfrozen one gives when it is run again under the same freeze."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pytest_circuitfreeze.suites.claims import Claim, in_run
from pytest_circuitfreeze.suites.judge.replay import Replay

__all__ = ["compare_gradients_with_replay", "compare_with_replay"]


def compare_with_replay(claim: Claim, replay: Replay) -> None:
    """Demands that z of a layer, and its pattern if it was seen, are what the clean attention gives when run again."""
    real, seen = replay.real, replay.seen
    place = {"layer": replay.site.layer, **in_run(seen.run)}
    (z, pattern), (other, moved) = replay.values(), replace(replay, rounding=True).values()
    where = real[:, :, None, None]  # a padded query attends to nothing
    want, off = z.where(where, 0.0), other.where(where, 0.0)
    bound = (want.double() - off.double()).abs().amax((0, 1, 3), keepdim=True)
    claim.within("z", seen.mixed().where(where, 0.0), want, bound, "row position head feature", **place)
    if seen.pattern is not None and pattern is not None and moved is not None:
        where = real[:, None, :, None]
        want, off = pattern.where(where, 0.0), moved.where(where, 0.0)
        bound = (want.double() - off.double()).abs().amax((0, 2, 3), keepdim=True)
        claim.within("pattern", seen.pattern.where(where, 0.0), want, bound, "row head query key", **place)


def compare_gradients_with_replay(claim: Claim, runs: Sequence[Replay]) -> None:
    """Demands that gradients of a layer's input and of its parameters are those of the estimators.

    Args:
        runs: of the one layer in one pass, all that gradients went through; parameters have the sum of theirs.
    """
    kinds = (runs, [replace(run, rounding=True) for run in runs], [replace(run, spoiled=True) for run in runs])
    due, moved, spoiled = ([one.gradients() for one in each] for each in kinds)
    for run, *gradients in zip(runs, due, moved, spoiled, strict=True):
        _compare_gradient(claim, run, "the input", run.seen.hidden.grad, *(one.pop("") for one in gradients))
    for name, parameter in runs[0].site.module.named_parameters() if runs else ():
        of_runs = [[one[name] for one in each if name in one] for each in (due, moved, spoiled)]
        if of_runs[0]:
            sums = (torch.stack(each).sum(0) for each in of_runs)
            _compare_gradient(claim, runs[0], name, parameter.grad, *sums)


def _compare_gradient(
    claim: Claim, replay: Replay, what: str, got: Tensor | None, want: Tensor, off: Tensor, spoiled: Tensor
) -> None:
    bound = (want.double() - off.double()).abs().max()
    # What the freeze makes zero, whatever arrives, is zero; what happens to be may as well be lost in rounding.
    bounds = torch.where(spoiled == 0, 0.0, bound)
    got = torch.zeros_like(want) if got is None else got
    place = {"layer": replay.site.layer}
    if what == "the input":
        claim.within(
            "gradient of the input", got, want, bounds, "row position feature", **place, **in_run(replay.seen.run)
        )
    else:  # the sum over all runs
        claim.within(f"gradient of {what}", got, want, bounds, "", **place)
