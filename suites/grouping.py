"""Grouping: which query heads a frozen KV head reaches, and which are spared, read off from exact structure.

A head whose values are zero has a z of zeros, and a head whose queries or keys are zero has a uniform pattern, both
exactly; no other head of a model with drawn or trained weights has either. So the heads that a freeze reached are
counted, not measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.claims import Claim, Margin, check
from pytest_circuitfreeze.suites.independence import first_frozen, patterns, unshares
from pytest_circuitfreeze.suites.judge.judged_sites import Site
from pytest_circuitfreeze.suites.judge.observed_passes import run_pass
from pytest_circuitfreeze.suites.judge.rounding import largest_change, run_nudged_pass

if TYPE_CHECKING:
    from freeze_core import InterventionConfig
    from pytest_circuitfreeze.engines import Engine

__all__ = ["check_frozen_queries_and_keys_reach_their_readers", "check_frozen_values_reach_their_readers"]


@check
def check_frozen_values_reach_their_readers(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch
) -> Margin:
    """With v at zero, z is zero in exactly the due heads: the chosen ones, under `group` all that share theirs.

    Args:
        config: `v` or `ov`, to `zero`, at strength 1.

    Raises:
        ClaimBroken: other heads were reached.
    """
    claim = Claim("frozen values reach their readers alone")
    _demand_zeroing(claim, config, {"v", "ov"})
    site = first_frozen(model, config)
    z = run_pass(engine, model, config, batch).layers[site.layer].mixed()
    reached = [head for head in range(site.heads) if not z[:, :, head].any()]
    due = _readers(site, config)
    claim.demand(reached == due, f"z is zero in heads {reached}, not in {due}", layer=site.layer)
    return claim.margin


@check
def check_frozen_queries_and_keys_reach_their_readers(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch
) -> Margin:
    """With q or k at zero, exactly the due heads attend uniformly.

    Args:
        config: `q`, `k` or `qk`, to `zero`, at strength 1.
        batch: at least two columns, without padding.

    Raises:
        ClaimBroken: other heads were reached.
    """
    claim = Claim("frozen queries and keys reach their readers alone")
    _demand_zeroing(claim, config, {"q", "k", "qk"})
    claim.demand(batch.input_ids.shape[1] > 1 and bool(batch.real.all()), "asked about a batch that shows no pattern")
    site = first_frozen(model, config)
    seen = patterns(run_pass(engine, model, config, batch, attn="eager", patterns=True), site)
    reached = [head for head in range(site.heads) if _uniform(seen[:, head])]
    if site.formula is None:
        # A head may have more to go by than queries and keys (ALiBi, a bias of its norm): those whose pattern moved.
        clean = patterns(run_pass(engine, model, None, batch, attn="eager", patterns=True), site)
        moved = run_nudged_pass if unshares(site, config) else run_pass
        near = patterns(moved(engine, model, None, batch, attn="eager", patterns=True), site)
        changes = [largest_change(clean[:, head], seen[:, head]) for head in range(site.heads)]
        rounding = [largest_change(clean[:, head], near[:, head]) for head in range(site.heads)]
        reached = [head for head in range(site.heads) if changes[head] > rounding[head]]
    own = str(config.circuit) == "q"
    due = sorted(_chosen(site, config)) if own else _readers(site, config)
    what = "moved" if site.formula is None else "uniform"
    claim.demand(reached == due, f"patterns are {what} in heads {reached}, not in {due}", layer=site.layer)
    return claim.margin


def _demand_zeroing(claim: Claim, config: InterventionConfig, circuits: set[str]) -> None:
    fits = str(config.circuit) in circuits and config.freeze_type == "zero" and config.strength == 1
    claim.demand(fits, f"asked about a freeze that is not {' or '.join(sorted(circuits))} to zero at strength 1")


def _chosen(site: Site, config: InterventionConfig) -> set[int]:
    """The query heads that the config names, counted from the front."""
    heads = range(site.heads) if config.head_indices is None else config.head_indices
    return {head % site.heads for head in heads}


def _readers(site: Site, config: InterventionConfig) -> list[int]:
    """Query heads that read a KV head which the chosen ones read; under `head`, the chosen ones alone."""
    chosen = _chosen(site, config)
    if str(config.kv_scope) == "head":
        return sorted(chosen)
    return [head for head in range(site.heads) if any(head // site.group == one // site.group for one in chosen)]


def _uniform(pattern: torch.Tensor) -> bool:
    """Whether every query of `pattern [batch, query, key]` gives all keys that it sees the same weight."""
    seen = pattern > 0
    largest = pattern.amax(-1, keepdim=True).expand_as(pattern)
    return bool((pattern[seen] == largest[seen]).all())
