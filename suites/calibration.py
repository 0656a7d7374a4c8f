"""Calibrated statistics are those of every real token, counted once, whatever the batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pytest_circuitfreeze.recordings import Calibrated
from pytest_circuitfreeze.suites.claims import Claim, Margin, check, in_run
from pytest_circuitfreeze.suites.judge.expected_replacements import Clean, clean_pass
from pytest_circuitfreeze.suites.judge.judged_sites import ROLES
from pytest_circuitfreeze.suites.judge.site_lookup import sites_without_formula
from pytest_circuitfreeze.suites.tolerance import gamma

__all__ = ["check_statistics_are_of_the_real_tokens"]


@check
def check_statistics_are_of_the_real_tokens(model: PreTrainedModel, statistics: Calibrated) -> Margin:
    """Calibrated means and deviations are the judge's own over the same batches, padding left out, in float64.

    Neither moves by more than what samples are moved by, so that a sum's rounding, put on the samples, bounds both. A
    part of the trust in every other claim about statistics: it asks nothing of an engine.

    Raises:
        ClaimBroken: they are not.
    """
    claim = Claim("statistics are of the real tokens")
    passes = [clean_pass(model, source) for source in statistics.sources]
    tokens = sum(int(each.real.sum()) for each in passes)
    claim.demand(statistics.tokens == tokens, f"{statistics.tokens} tokens are said to be in it, not {tokens}")
    known = sites_without_formula(model)
    for layer, held in statistics.items():
        runs = len(passes[0].runs[layer])
        for role in ROLES:
            mean, std = (values[role] if runs > 1 else values[role][None] for values in (held.mean, held.std))
            claim.demand(len(mean) == len(std) == runs, f"{list(mean.shape)} is calibrated of {runs} runs", layer=layer)
            names = known[layer].parts_of(role)
            for run in range(runs):
                samples = _samples(passes, layer, names, run, mean.shape[1])
                bound = gamma(tokens, torch.float64) * float(samples.abs().max())
                for what, got, want in (
                    ("mean", mean[run], samples.mean(0)),
                    ("deviation", std[run], samples.std(0, correction=0)),
                ):
                    got = got.to(want.device)
                    if len(names) > 1:  # in which order parts are joined is no one's concern
                        got, want = got.sort(-1).values, want.sort(-1).values
                    claim.within(f"{what} of {role}", got, want, bound, "head feature", layer=layer, **in_run(run))
    return claim.margin


def _samples(passes: Sequence[Clean], layer: int, names: Sequence[str], run: int, heads: int) -> Tensor:
    """One role's real tokens in all `passes`, `[token, head, feature]` float64; what heads share is given to each."""
    parts = [torch.cat([each.heads(layer, name, run)[each.real].double() for each in passes]) for name in names]
    return torch.cat([part.repeat_interleave(max(1, heads // part.shape[1]), dim=1) for part in parts], dim=-1)
