"""Recorded activations: a recording is what attention saw, and held in place it makes the recorded patterns."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pytest_circuitfreeze.recordings import Recorded, recorded
from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.claims import Claim, ClaimBroken, Margin, NotApplicable, check, in_run
from pytest_circuitfreeze.suites.independence import patterns
from pytest_circuitfreeze.suites.judge.expected_replacements import Clean, clean_pass
from pytest_circuitfreeze.suites.judge.judged_sites import ROLES, Site
from pytest_circuitfreeze.suites.judge.observed_passes import Pass, run_pass
from pytest_circuitfreeze.suites.judge.oracle import chosen_heads
from pytest_circuitfreeze.suites.judge.rounding import largest_change, run_nudged_pass
from pytest_circuitfreeze.suites.judge.site_lookup import sites, sites_without_formula
from pytest_circuitfreeze.suites.tolerance import Nudge
from pytest_circuitfreeze.wrapped import device_of, dtype_of

if TYPE_CHECKING:
    from freeze_core import InterventionConfig
    from pytest_circuitfreeze.engines import Engine

__all__ = ["check_patterns_are_the_recorded", "check_recordings_are_what_attention_saw"]


@check
def check_recordings_are_what_attention_saw(model: PreTrainedModel, recording: Recorded) -> Margin:
    """Recorded q, k, v and z, and the mask, are what the judge's own recorder sees on the same input, bit for bit.

    A part of the trust in every other claim about references: it asks nothing of an engine.

    Raises:
        ClaimBroken: they are not.
    """
    claim = Claim("a recording is what attention saw")
    mask, given = recording.attention_mask, recording.source.attention_mask
    alike = mask is given is None or (mask is not None and given is not None and torch.equal(mask.cpu(), given))
    claim.demand(alike, f"the mask kept is {mask}, the one given was {given}")
    clean = clean_pass(model, recording.source)
    known = sites_without_formula(model)
    for layer, held in recording.items():
        for seen in clean.runs[layer]:
            where = {"layer": layer, **in_run(seen.run)}
            for role in ROLES:
                names = known[layer].parts_of(role)
                got = _of_run(claim, getattr(held, role), seen.run, len(clean.runs[layer]))
                want = _whole(clean, layer, seen.run, names, got.shape[2])
                if len(names) > 1:  # in which order parts are joined is no one's concern
                    got, want = got.sort(-1).values, want.sort(-1).values
                claim.same(role, got, want, "row position head feature", **where)
            z = _of_run(claim, held.z, seen.run, len(clean.runs[layer]))
            claim.same("z", z, seen.mixed(), "row position head feature", **where)
    return claim.margin


def _demand_same_keys(model: PreTrainedModel, site: Site, recorded: Pass, clean: Pass) -> None:
    """Demands that the unfrozen model lets a query see the same keys on both inputs: a mask is no part of a pattern.

    Raises:
        NotApplicable: it does not, since an indexer chooses keys by the hidden states.
    """
    one, other = (patterns(found, site) > 0 for found in (recorded, clean))
    if not torch.equal(*torch.broadcast_tensors(one, other)):
        raise NotApplicable(f"{type(model).__name__} chooses by its input which keys a query sees at all")


def _of_run(claim: Claim, recorded: Tensor, run: int, runs: int) -> Tensor:
    """One run of what was recorded of a layer, `[batch, token, head, feature]`."""
    if runs == 1:
        return recorded
    claim.demand(recorded.dim() == 5 and len(recorded) == runs, f"{list(recorded.shape)} is recorded of {runs} runs")
    return recorded[run]


def _whole(clean: Clean, layer: int, run: int, names: list[str], heads: int) -> Tensor:
    """What the judge saw of one role, `[batch, token, head, feature]`; what heads share is given to each."""
    parts = [clean.heads(layer, name, run) for name in names]
    return torch.cat([part.repeat_interleave(max(1, heads // part.shape[2]), dim=2) for part in parts], dim=-1)


@check
def check_patterns_are_the_recorded(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch
) -> Margin:
    """With queries and keys held at a recording, a head's pattern is the one that it had there, within rounding.

    Args:
        config: `qk` or `both`, to `reference`, at strength 1.

    Raises:
        ClaimBroken: it is another.
    """
    claim = Claim("held patterns are the recorded ones")
    held = config.reference
    claim.demand(
        isinstance(held, Recorded) and config.strength == 1 and str(config.circuit) in ("qk", "both"),
        "asked about a freeze that does not hold patterns",
    )
    assert isinstance(held, Recorded)
    # Under eager attention, as the patterns are: a family may compute something else there (Falcon with ALiBi does).
    config = replace(config, reference=recorded(model, held.source, list(held), "eager"))
    want = run_pass(engine, model, None, held.source, attn="eager", patterns=True)
    # Several families take the eager softmax in float32 whatever the model's dtype.
    rounding = torch.float32 if dtype_of(model) == torch.float64 else dtype_of(model)
    near = run_nudged_pass(engine, model, None, held.source, attn="eager", patterns=True, rounding=rounding)
    got = run_pass(engine, model, config, batch, attn="eager", patterns=True)
    where = batch.real.to(device_of(model))[:, None, :, None]  # a padded query attends to nothing
    runs = [(site, seen.run) for layer, site in sites(model).items() for seen in got.runs[layer]]
    for site, run in runs:
        queries, keys = (chosen_heads(site, config, role) for role in ("q", "k"))
        due, moved, seen = (
            patterns(found, site, run).expand(len(where), -1, -1, -1).where(where, 0.0) for found in (want, near, got)
        )
        # Of all heads together: one pattern of two tokens is a single number, which a nudge may miss by chance.
        bound = largest_change(due, Nudge(rounding)(moved.double(), moved.shape[-1]))
        for head in sorted(set(queries) & set(keys)):
            place = {"layer": site.layer, **in_run(run), "head": head}
            try:
                claim.within("pattern", seen[:, head], due[:, head], bound, "row query key", **place)
            except ClaimBroken:
                _demand_same_keys(
                    model, site, recorded=want, clean=run_pass(engine, model, None, batch, attn="eager", patterns=True)
                )
                raise
    return claim.margin
