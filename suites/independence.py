"""Independence, per layer: where a head looks and what it moves are frozen apart from each other."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.claims import Claim, Margin, check
from pytest_circuitfreeze.suites.judge.expected_replacements import material_of
from pytest_circuitfreeze.suites.judge.judged_sites import ROLES, CannotJudge, Role, Site
from pytest_circuitfreeze.suites.judge.observed_passes import Pass, attention_implementation, of_real_tokens, run_pass
from pytest_circuitfreeze.suites.judge.oracle import chosen_heads
from pytest_circuitfreeze.suites.judge.replay import Replay
from pytest_circuitfreeze.suites.judge.rounding import largest_change, run_nudged_pass
from pytest_circuitfreeze.suites.judge.site_lookup import sites
from pytest_circuitfreeze.suites.replays import compare_with_replay
from pytest_circuitfreeze.wrapped import device_of

if TYPE_CHECKING:
    from freeze_core import InterventionConfig
    from pytest_circuitfreeze.engines import Engine

__all__ = ["check_order_does_not_matter", "check_ov_leaves_qk", "check_qk_leaves_ov"]


@check
def check_qk_leaves_ov(engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch) -> Margin:
    """In the first frozen layer, freezing q or k leaves v, and the pattern of every head that reads none of it.

    Bit for bit; within rounding where KV heads are un-shared.

    Raises:
        ClaimBroken: something else moved.
    """
    claim = Claim("freezing QK leaves OV and other patterns")
    site = first_frozen(model, config)
    frozen = {*chosen_heads(site, config, "q"), *chosen_heads(site, config, "k")}
    spared = [head for head in range(site.heads) if head not in frozen]
    _compare(claim, engine, model, config, batch, site, roles=("v",), heads=spared)
    return claim.margin


@check
def check_ov_leaves_qk(engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch) -> Margin:
    """In the first frozen layer, freezing v leaves q, k and every pattern.

    Bit for bit; within rounding where KV heads are un-shared.

    Raises:
        ClaimBroken: something else moved.
    """
    claim = Claim("freezing OV leaves QK")
    site = first_frozen(model, config)
    _compare(claim, engine, model, config, batch, site, roles=("q", "k"), heads=list(range(site.heads)))
    return claim.margin


def _compare(
    claim: Claim,
    engine: Engine,
    model: PreTrainedModel,
    config: InterventionConfig,
    batch: Batch,
    site: Site,
    roles: tuple[Role, ...],
    heads: list[int],
) -> None:
    """Demands that activations of `roles` and patterns of `heads` are the unfrozen model's."""
    moved = run_nudged_pass if unshares(site, config) else run_pass  # the same pass again leaves no room: bit for bit
    clean, frozen = (run_pass(engine, model, which, batch) for which in (None, config))
    other = moved(engine, model, None, batch)
    want, got, near = (found.layers[site.layer].consumed() for found in (clean, frozen, other))
    for name in (name for role in roles for name in site.parts_of(role)):
        if name in got or not unshares(site, config):  # un-shared KV heads lie where the engine has put them
            bound = largest_change(want[name], near[name])
            claim.within(name, got[name], want[name], bound, "row position head feature", layer=site.layer)
    clean, frozen = (run_pass(engine, model, which, batch, attn="eager", patterns=True) for which in (None, config))
    other = moved(engine, model, None, batch, attn="eager", patterns=True)
    for head in heads:
        of_head, due = patterns(frozen, site)[:, head], patterns(clean, site)[:, head]
        bound = largest_change(due, patterns(other, site)[:, head])
        claim.within("pattern", of_head, due, bound, "row query key", layer=site.layer, head=head)
    if site.formula is None and unshares(site, config):
        # Where the un-shared heads lie is the engine's own choice: what they are shows in z.
        material = material_of(engine, model, [config], batch)
        seen, real = frozen.layers[site.layer], batch.real.to(device_of(model))
        with attention_implementation(model, "eager"):
            compare_with_replay(claim, Replay(model, site, seen, real, [config], material))


@check
def check_order_does_not_matter(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch
) -> Margin:
    """Freezing QK, then OV is freezing OV, then QK, and is freezing both at once.

    Args:
        config: any; its circuit is set to `qk`, `ov` and `both` in turn.

    Raises:
        ClaimBroken: the logits differ (by more than rounding, where KV heads are un-shared).
    """
    claim = Claim("QK and OV commute")
    qk, ov, both = (replace(config, circuit=circuit) for circuit in ("qk", "ov", "both"))
    want = of_real_tokens(run_pass(engine, model, both, batch).logits, batch)
    bound = 0.0
    if any(unshares(site, config) for site in sites(model).values()):
        moved = run_nudged_pass(engine, model, both, batch).logits
        bound = largest_change(want, of_real_tokens(moved, batch))
    for order in ([qk, ov], [ov, qk]):
        name = " then ".join(str(part.circuit) for part in order)
        got = of_real_tokens(run_pass(engine, model, order, batch).logits, batch)
        claim.within(f"logits of {name}", got, want, bound, "row position word")
    return claim.margin


def unshares(site: Site, config: InterventionConfig) -> bool:
    """Whether this freeze gives query heads of this layer KV heads of their own."""
    shared: tuple[Role, ...] = ("k", "v")
    own = str(config.kv_scope) == "head" and any(chosen_heads(site, config, role) for role in shared)
    return own and site.group > 1


def first_frozen(model: PreTrainedModel, config: InterventionConfig) -> Site:
    """The first layer that `config` freezes: up to its input, both models are the same."""
    known = sites(model)
    return next(
        known[layer] for layer in sorted(known) if any(chosen_heads(known[layer], config, role) for role in ROLES)
    )


def patterns(found: Pass, site: Site, run: int = 0) -> torch.Tensor:
    """`[batch, head, query, key]`, as the model gave them in one run of the layer."""
    pattern = found.runs[site.layer][run].pattern
    if pattern is None:
        raise CannotJudge(f"the model gave no pattern of layer {site.layer} under eager attention")
    return pattern
