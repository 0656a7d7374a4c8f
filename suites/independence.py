"""Independence, per layer: where a head looks and what it moves are frozen apart from each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.claims import Claim, Margin, check
from pytest_circuitfreeze.suites.judge.anatomy import ROLES, CannotJudge, Role, Site
from pytest_circuitfreeze.suites.judge.material import material_of
from pytest_circuitfreeze.suites.judge.oracle import chosen_heads
from pytest_circuitfreeze.suites.judge.passes import Pass, attention_implementation, look, of_real_tokens
from pytest_circuitfreeze.suites.judge.replay import Replay
from pytest_circuitfreeze.suites.judge.rounding import largest_change, nudged_look
from pytest_circuitfreeze.suites.judge.sites import AnySite, FoundSite, sites
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
    site: AnySite,
    roles: tuple[Role, ...],
    heads: list[int],
) -> None:
    """Demands that activations of `roles` and patterns of `heads` are the unfrozen model's."""
    moved = nudged_look if unshares(site, config) else look  # the same pass again leaves no room: bit for bit
    clean, frozen = (look(engine, model, which, batch) for which in (None, config))
    other = moved(engine, model, None, batch)
    for what, want, got, near, axes in _views(clean, frozen, other, site, roles):
        claim.within(what, got, want, largest_change(want, near), axes, layer=site.layer)
    clean, frozen = (look(engine, model, which, batch, attn="eager", patterns=True) for which in (None, config))
    other = moved(engine, model, None, batch, attn="eager", patterns=True)
    for head in heads:
        want, got = patterns(clean, site)[:, head], patterns(frozen, site)[:, head]
        bound = largest_change(want, patterns(other, site)[:, head])
        claim.within("pattern", got, want, bound, "row query key", layer=site.layer, head=head)
    if isinstance(site, FoundSite) and unshares(site, config):
        # Where the un-shared heads lie is the engine's own choice: what they are shows in z.
        material = material_of(engine, model, [config], batch)
        seen, real = frozen.layers[site.layer], batch.real.to(device_of(model))
        with attention_implementation(model, "eager"):
            compare_with_replay(claim, Replay(model, site, seen, real, [config], material))


def _views(
    clean: Pass, frozen: Pass, other: Pass, site: AnySite, roles: tuple[Role, ...]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor, str]]:
    """What is read of `roles` in three passes: its name, one view a query head or KV head of each pass, the axes."""
    for role in roles:
        if not isinstance(site, FoundSite):
            want, got, near = (own_view(found, site, role) for found in (clean, frozen, other))
            yield role, want, got, near, "row head position feature"
            continue
        for name in site.parts_of(role):
            want, got, near = (found.layers[site.layer].parts[name] for found in (clean, frozen, other))
            if got.shape == want.shape:  # else the KV heads are un-shared
                features = site.parts[name].features.to(want.device)
                want, got, near = (found[..., features] for found in (want, got, near))
                yield name, want, got, near, "row position head feature"


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
    want = of_real_tokens(look(engine, model, both, batch).logits, batch)
    bound = 0.0
    if any(unshares(site, config) for site in sites(model).values()):
        moved = nudged_look(engine, model, both, batch).logits
        bound = largest_change(want, of_real_tokens(moved, batch))
    for order in ([qk, ov], [ov, qk]):
        name = " then ".join(str(part.circuit) for part in order)
        got = of_real_tokens(look(engine, model, order, batch).logits, batch)
        claim.within(f"logits of {name}", got, want, bound, "row position word")
    return claim.margin


def unshares(site: AnySite, config: InterventionConfig) -> bool:
    """Whether this freeze gives query heads of this layer KV heads of their own."""
    shared: tuple[Role, ...] = ("k", "v")
    own = str(config.kv_scope) == "head" and any(chosen_heads(site, config, role) for role in shared)
    return own and site.group > 1


def first_frozen(model: PreTrainedModel, config: InterventionConfig) -> AnySite:
    """The first layer that `config` freezes: up to its input, both models are the same."""
    known = sites(model)
    return next(
        known[layer] for layer in sorted(known) if any(chosen_heads(known[layer], config, role) for role in ROLES)
    )


def own_view(found: Pass, site: Site, role: Role) -> torch.Tensor:
    """`role` as each query head reads it, `[batch, query head, token, head_dim]`."""
    used = found.layers[site.layer].qkv[role]
    return used.repeat_interleave(site.heads // used.shape[1], dim=1)


def patterns(found: Pass, site: AnySite, run: int = 0) -> torch.Tensor:
    """`[batch, head, query, key]`, as the model gave them in one run of the layer."""
    pattern = found.runs[site.layer][run].pattern
    if pattern is None:
        raise CannotJudge(f"the model gave no pattern of layer {site.layer} under eager attention")
    return pattern
