"""The frozen values themselves: what attention consumed is what the contract says, to rounding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.claims import Claim, Margin, NotApplicable, check
from pytest_circuitfreeze.suites.judge.expected_replacements import material_of
from pytest_circuitfreeze.suites.judge.judged_sites import ROLES, Role, Site, rows_of
from pytest_circuitfreeze.suites.judge.observed_passes import (
    attention_implementation,
    logits_of,
    of_real_tokens,
    run_pass,
)
from pytest_circuitfreeze.suites.judge.oracle import Answer, chosen_heads, due, judged_layers
from pytest_circuitfreeze.suites.judge.replay import Replay
from pytest_circuitfreeze.suites.judge.rounding import largest_change, run_nudged_pass
from pytest_circuitfreeze.suites.judge.site_lookup import implementations, sites, tied_parameters
from pytest_circuitfreeze.suites.replays import compare_with_replay
from pytest_circuitfreeze.suites.tolerance import Nudge
from pytest_circuitfreeze.wrapped import device_of, dtype_of

if TYPE_CHECKING:
    from freeze_core import InterventionConfig
    from pytest_circuitfreeze.engines import Engine

__all__ = [
    "check_full_strength_replaces_anything",
    "check_implementations_agree",
    "check_values_are_the_oracles",
    "check_zero_strength_is_unfrozen",
    "known_beforehand",
]


@check
def check_values_are_the_oracles(
    engine: Engine,
    model: PreTrainedModel,
    configs: Sequence[InterventionConfig],
    batch: Batch,
    attn: str | None = None,
) -> Margin:
    """In every frozen layer, and in the one after it, what heads consume and give is what an oracle computes.

    Where the judge knows by heart how a layer attends, q, k, v and z are compared with a float64 oracle; elsewhere z
    with what the clean attention gives when it is run again, and under eager attention the pattern, too.

    Args:
        configs: installed together, the later one winning where they meet.
        attn: attention implementation, by default the model's first; under eager z alone is compared with float64.

    Raises:
        ClaimBroken: they are not, beyond what rounding in the model's dtype explains.
    """
    attn = attn or implementations(model)[0]
    claim = Claim("frozen values are the oracle's")
    known = sites(model)
    material = material_of(engine, model, configs, batch)
    found = run_pass(engine, model, configs, batch, attn=attn, patterns=attn == "eager")
    real = batch.real.to(device_of(model))
    for layer in judged_layers(known, configs):
        site, seen = known[layer], found.layers[layer]
        if site.formula is None:
            with attention_implementation(model, attn):
                for run in found.runs[layer]:
                    compare_with_replay(claim, Replay(model, site, run, real, configs, material))
            continue
        dtype = seen.mixed().dtype
        softmax = (
            torch.float32 if attn == "eager" and site.formula.float32_softmax and dtype == torch.float64 else dtype
        )
        exact = due(site, seen, real, configs, material)
        moved = due(site, seen, real, configs, material, Nudge(dtype), softmax)
        for role in ROLES if attn == "sdpa" else ():
            used = seen.consumed()[role].transpose(1, 2)
            bound = (exact.used[role] - moved.used[role]).abs().amax((0, 2, 3), keepdim=True)
            claim.within(role, used, exact.used[role], bound, "row head position feature", layer=layer)
        _compare_z(claim, layer, seen.mixed(), exact, moved, real)
    return claim.margin


def _compare_z(claim: Claim, layer: int, got: Tensor, exact: Answer, moved: Answer, real: Tensor) -> None:
    where = real[:, :, None, None]  # a padded query attends to nothing
    want, other = exact.z.where(where, 0.0), moved.z.where(where, 0.0)
    bound = (want - other).abs().amax((0, 1, 3), keepdim=True)
    claim.within("z", got.double().where(where, 0.0), want, bound, "row position head feature", layer=layer)


@check
def check_zero_strength_is_unfrozen(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch
) -> Margin:
    """At `strength=0` the logits are those of the unfrozen model, bit for bit.

    Raises:
        ClaimBroken: they are not.
    """
    claim = Claim("strength 0 is the unfrozen model")
    claim.demand(config.strength == 0, f"asked about strength {config.strength}; the claim is about 0")
    with torch.no_grad():
        clean = logits_of(model, model, batch)
    claim.same("logits", run_pass(engine, model, config, batch).logits, clean, "row position word")
    return claim.margin


@check
def check_full_strength_replaces_anything(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch, poison: float = torch.nan
) -> Margin:
    """At `strength=1` nothing of the activation is left, not even where it is inf or nan.

    The weights that make the frozen features are set to `poison` for a pass without gradients and one with them; the
    logits must not notice.

    Args:
        config: at strength 1, to a replacement that is `known_beforehand`.

    Raises:
        ClaimBroken: they do.
    """
    claim = Claim("full strength replaces whatever was there")
    held = config.strength == 1 and known_beforehand(config)
    claim.demand(held, "asked about a replacement that depends on the activation")
    _demand_weights(model)
    shared = tied_parameters(model)
    if any(parameter in shared for site in sites(model).values() for parameter in site.module.parameters()):
        raise NotApplicable("another layer that is not frozen has the same weights, and would be poisoned along")
    # One freeze for all passes: to a new one, statistics would be of another model.
    with engine.freeze(model, config) as frozen:
        for what, gradients in (("logits", False), ("logits with gradients", True)):
            with torch.set_grad_enabled(gradients):
                want = logits_of(frozen, model, batch)
                with _poisoned(model, config, poison):
                    got = logits_of(frozen, model, batch)
            claim.same(what, got, want, "row position word")
    return claim.margin


def _demand_weights(model: PreTrainedModel) -> None:
    """Demands that each feature of a projection has weights of its own that can be set.

    Raises:
        NotApplicable: they are computed from others (weight norm), quantised, or hidden in a wrapper.
    """
    for site in sites(model).values():
        for path, source in site.sources.items():
            weight = getattr(source, "weight", None)
            held = {parameter.data_ptr() for parameter in source.parameters() if type(parameter) is torch.nn.Parameter}
            if not (type(weight) is torch.nn.Parameter and weight.is_floating_point() and weight.data_ptr() in held):
                raise NotApplicable(
                    f"the weights of {path} in layer {site.layer} are computed, quantised or in a wrapper, and cannot "
                    "be set to nan for single features"
                )


def known_beforehand(config: InterventionConfig) -> bool:
    """Whether the replacement is known before the pass: `zero`, recorded, calibrated, or noise of a given size."""
    sized = config.freeze_type == "noise" and config.noise_std is not None
    return sized or config.freeze_type in ("zero", "reference") or config.statistics is not None


@contextmanager
def _poisoned(model: PreTrainedModel, config: InterventionConfig, poison: float) -> Iterator[None]:
    """Sets the weights of every feature that all its readers see frozen to `poison`, and puts them back."""
    saved = []
    try:
        for site in sites(model).values():
            for role, readers, rows in _rows(site):
                if set(readers).issubset(chosen_heads(site, config, role)):
                    saved.append((rows, rows.clone()))
                    rows.fill_(poison)
        yield
    finally:
        for rows, values in saved:
            rows.copy_(values)


def _rows(site: Site) -> Iterator[tuple[Role, Sequence[int], Tensor]]:
    """For each feature of each role its readers and, as a view, the row of the weight that makes it."""
    for part in site.parts.values():
        weight = cast(Tensor, rows_of(site.sources[part.path]))
        for readers, features in zip(part.readers, part.features.tolist(), strict=True):
            for feature in features:
                yield part.role, readers, weight[feature]


@check
def check_implementations_agree(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch
) -> Margin:
    """Under a freeze, eager and sdpa attention give the same logits, within rounding.

    Raises:
        ClaimBroken: they do not.
    """
    claim = Claim("a freeze is the same under eager and sdpa")
    if len(implementations(model)) < 2:
        raise NotApplicable(f"{type(model).__name__} runs under {implementations(model)[0]} attention alone")

    def compare(claim: Claim, which: InterventionConfig | None) -> None:
        passes = [run_pass(engine, model, which, batch), run_pass(engine, model, which, batch, attn="eager")]
        # Several families take the eager softmax in float32 whatever the model's dtype.
        rounding = torch.float32 if dtype_of(model) == torch.float64 else None
        passes.append(run_nudged_pass(engine, model, which, batch, rounding=rounding))
        sdpa, eager, moved = (of_real_tokens(each.logits, batch) for each in passes)
        claim.within("logits", eager, sdpa, largest_change(sdpa, moved), "row position word")

    claim.compared(compare, config)
    return claim.margin
