"""The frozen values themselves: what attention consumed is what the contract says, to rounding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.claims import Claim, Margin
from pytest_circuitfreeze.suites.judge.anatomy import ROLES, sites
from pytest_circuitfreeze.suites.judge.noise import noise_of
from pytest_circuitfreeze.suites.judge.oracle import Answer, chosen_heads, due, judged_layers
from pytest_circuitfreeze.suites.judge.passes import look
from pytest_circuitfreeze.suites.judge.rounding import largest_change, nudged_look
from pytest_circuitfreeze.suites.tolerance import Nudge

if TYPE_CHECKING:
    from freeze_core import InterventionConfig
    from pytest_circuitfreeze.engines import Engine

__all__ = [
    "check_full_strength_replaces_anything",
    "check_implementations_agree",
    "check_values_are_the_oracles",
    "check_zero_strength_is_unfrozen",
]


def check_values_are_the_oracles(
    engine: Engine,
    model: PreTrainedModel,
    configs: Sequence[InterventionConfig],
    batch: Batch,
    attn: str = "sdpa",
) -> Margin:
    """In every frozen layer, and in the one after it, q, k, v and z of all heads are what a float64 oracle computes.

    Args:
        configs: installed together, the later one winning where they meet.
        attn: attention implementation; under eager z alone is compared.

    Raises:
        ClaimBroken: they are not, beyond what rounding in the model's dtype explains.
    """
    claim = Claim("frozen values are the oracle's", model=model, engine=engine, configs=configs, batch=batch, attn=attn)
    known = sites(model)
    noise = noise_of(engine, model, configs, batch.input_ids.shape[1])
    found = look(engine, model, configs, batch, attn=attn)
    real = batch.real.to(model.device)
    for layer in judged_layers(known, configs):
        site, seen = known[layer], found.layers[layer]
        dtype = seen.mixed().dtype
        softmax = torch.float32 if attn == "eager" and site.family.float32_softmax and dtype == torch.float64 else dtype
        exact = due(site, seen, real, configs, noise)
        moved = due(site, seen, real, configs, noise, Nudge(dtype), softmax)
        for role in ROLES if attn == "sdpa" else ():
            used = seen.qkv[role].repeat_interleave(site.heads // seen.qkv[role].shape[1], dim=1)
            bound = (exact.used[role] - moved.used[role]).abs().amax((0, 2, 3), keepdim=True)
            claim.within(f"{role} of layer {layer}", used, exact.used[role], bound, "batch head token feature")
        _compare_z(claim, layer, seen.mixed(), exact, moved, real)
    return claim.margin


def _compare_z(claim: Claim, layer: int, got: Tensor, exact: Answer, moved: Answer, real: Tensor) -> None:
    where = real[:, :, None, None]  # a padded query attends to nothing
    want, other = exact.z.where(where, 0.0), moved.z.where(where, 0.0)
    bound = (want - other).abs().amax((0, 1, 3), keepdim=True)
    claim.within(f"z of layer {layer}", got.double().where(where, 0.0), want, bound, "batch token head feature")


def check_zero_strength_is_unfrozen(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch
) -> Margin:
    """At `strength=0` the logits are those of the unfrozen model, bit for bit.

    Raises:
        ClaimBroken: they are not.
    """
    claim = Claim("strength 0 is the unfrozen model", model=model, engine=engine, config=config, batch=batch)
    claim.demand(config.strength == 0, f"asked about strength {config.strength}; the claim is about 0")
    clean = look(engine, model, None, batch).logits
    claim.same("logits", look(engine, model, config, batch).logits, clean, "batch token word")
    return claim.margin


def check_full_strength_replaces_anything(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch, poison: float = torch.nan
) -> Margin:
    """At `strength=1` nothing of the activation is left, not even where it is inf or nan.

    The weights that make the frozen features are set to `poison` for one pass; the logits must not notice.

    Args:
        config: at strength 1, to a replacement that does not depend on the activation: `zero`, or `noise` with a
            `noise_std`.

    Raises:
        ClaimBroken: they do.
    """
    claim = Claim(
        "full strength replaces whatever was there",
        model=model,
        engine=engine,
        config=config,
        batch=batch,
        poison=poison,
    )
    free = config.freeze_type == "zero" or (config.freeze_type == "noise" and config.noise_std is not None)
    claim.demand(config.strength == 1 and free, "asked about a replacement that depends on the activation")
    want = look(engine, model, config, batch).logits
    with _poisoned(model, config, poison):
        got = look(engine, model, config, batch).logits
    claim.same("logits", got, want, "batch token word")
    return claim.margin


@contextmanager
def _poisoned(model: PreTrainedModel, config: InterventionConfig, poison: float) -> Iterator[None]:
    """Sets the weights of every feature that all its readers see frozen to `poison`, and puts them back."""
    saved = []
    try:
        for site in sites(model).values():
            for role, weight in site.weights().items():
                readers = site.heads // site.count(role)
                frozen = set(chosen_heads(site, config, role))
                for head in range(site.count(role)):
                    if frozen.issuperset(range(head * readers, (head + 1) * readers)):
                        saved.append((weight[head], weight[head].clone()))
                        weight[head].fill_(poison)
        yield
    finally:
        for rows, values in saved:
            rows.copy_(values)


def check_implementations_agree(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch
) -> Margin:
    """Under a freeze, eager and sdpa attention give the same logits, within rounding.

    Raises:
        ClaimBroken: they do not.
    """
    claim = Claim("a freeze is the same under eager and sdpa", model=model, engine=engine, config=config, batch=batch)
    real = batch.real
    sdpa = look(engine, model, config, batch).logits[real]
    eager = look(engine, model, config, batch, attn="eager").logits[real]
    # Several families take the eager softmax in float32 whatever the model's dtype.
    rounding = torch.float32 if model.dtype == torch.float64 else None
    moved = nudged_look(engine, model, config, batch, rounding=rounding).logits[real]
    claim.within("logits", eager, sdpa, largest_change(sdpa, moved), "real word")
    return claim.margin
