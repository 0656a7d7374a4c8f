"""Calibrated statistics are those of every real token, counted once, whatever the batches."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from pytest_circuitfreeze.recordings import Calibrated
from pytest_circuitfreeze.suites.claims import Claim, Margin
from pytest_circuitfreeze.suites.judge.anatomy import ROLES
from pytest_circuitfreeze.suites.judge.material import clean_pass
from pytest_circuitfreeze.suites.judge.sites import as_found
from pytest_circuitfreeze.suites.tolerance import gamma

__all__ = ["check_statistics_are_of_the_real_tokens"]


def check_statistics_are_of_the_real_tokens(model: PreTrainedModel, statistics: Calibrated) -> Margin:
    """Calibrated means and deviations are the judge's own over the same batches, padding left out, in float64.

    Neither moves by more than what samples are moved by, so that a sum's rounding, put on the samples, bounds both. A
    part of the trust in every other claim about statistics: it asks nothing of an engine.

    Raises:
        ClaimBroken: they are not.
    """
    claim = Claim("statistics are of the real tokens", model=model, statistics=statistics)
    passes = [clean_pass(model, source) for source in statistics.sources]
    tokens = sum(int(each.real.sum()) for each in passes)
    claim.demand(statistics.tokens == tokens, f"{statistics.tokens} tokens are said to be in it, not {tokens}")
    known = as_found(model)
    for layer, held in statistics.items():
        for role in ROLES:
            parts = []
            for name in known[layer].parts_of(role):
                own = torch.cat([each.heads(layer, name)[each.real].double() for each in passes])
                parts.append(own.repeat_interleave(max(1, len(held.mean[role]) // own.shape[1]), dim=1))
            samples = torch.cat(parts, dim=-1)
            bound = gamma(tokens, torch.float64) * float(samples.abs().max())
            for what, got, want in (
                ("mean", held.mean[role], samples.mean(0)),
                ("deviation", held.std[role], samples.std(0, correction=0)),
            ):
                got = got.to(want.device)
                if len(parts) > 1:  # in which order parts are joined is no one's concern
                    got, want = got.sort(-1).values, want.sort(-1).values
                claim.within(f"{what} of {role} in layer {layer}", got, want, bound, "head feature")
    return claim.margin
