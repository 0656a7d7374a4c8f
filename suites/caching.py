"""Caching: a freeze computes the same with a cache and without one, and a cache of another freeze is recognised."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.claims import Claim, Margin, NotApplicable, check
from pytest_circuitfreeze.suites.foreign_caches import other_freezes, told
from pytest_circuitfreeze.suites.independence import unshares
from pytest_circuitfreeze.suites.judge.decoding import decode, demand_decoding, go_on
from pytest_circuitfreeze.suites.judge.judged_sites import ROLES, CannotJudge, Site
from pytest_circuitfreeze.suites.judge.observed_passes import attention_implementation, of_real_tokens, run_pass
from pytest_circuitfreeze.suites.judge.oracle import chosen_heads
from pytest_circuitfreeze.suites.judge.rounding import largest_change
from pytest_circuitfreeze.suites.judge.site_lookup import implementations, sites
from pytest_circuitfreeze.suites.refusals import Refused
from pytest_circuitfreeze.suites.tolerance import nudged

if TYPE_CHECKING:
    from freeze_core import InterventionConfig
    from pytest_circuitfreeze.engines import Engine

__all__ = [
    "check_cached_equals_recomputed",
    "check_foreign_caches_are_recognised",
    "check_recomputation_is_the_same_pass",
]


@check
def check_cached_equals_recomputed(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch, ends: Sequence[int]
) -> Margin:
    """A batch that is run in pieces on a cache gives the logits of the batch that is run at once, within rounding.

    Args:
        config: where it freezes to statistics of the pass, which a piece does not have, those of the unfrozen model
            on `batch` are used as calibrated ones.
        ends: the columns before which pieces end, ascending, the last one that of the batch.

    Raises:
        ClaimBroken: it does not, and the unfrozen model does.
        NotApplicable: the unfrozen model does not, or has no cache.
    """
    claim = Claim("with a cache a freeze is what it is without one")
    demand_decoding(engine, model, batch, ends)
    config = _calibrated(model, config, batch)

    def compare(claim: Claim, which: InterventionConfig | None) -> None:
        want = of_real_tokens(run_pass(engine, model, which, batch).logits, batch)
        got = of_real_tokens(decode(engine, model, which, batch, ends), batch)
        other = nudged(model)
        moved = run_pass(engine, other, which and _carried_over(other, which, batch), batch).logits
        bound = largest_change(want, of_real_tokens(moved, batch))
        claim.within("logits", got, want, bound, "row position word")

    claim.compared(compare, config)
    return claim.margin


def _calibrated(model: PreTrainedModel, config: InterventionConfig, batch: Batch) -> InterventionConfig:
    """`config` with statistics of the unfrozen model on `batch`, where it would take those of the pass."""
    from freeze_core import AttentionCircuitFreezer, UnsupportedModelError

    if config.freeze_type in ("zero", "resample") or config.noise_std is not None:
        return config
    try:
        statistics = AttentionCircuitFreezer().calibrate(model, [batch.arguments(model)], progress=False)
    except UnsupportedModelError as error:
        raise NotApplicable(f"there are no calibrated statistics of this model: {error}") from error
    return replace(config, statistics=statistics)


def _carried_over(other: PreTrainedModel, config: InterventionConfig, batch: Batch) -> InterventionConfig:
    """`config`, whose statistics are of one model, for another one that is to be frozen to the same values."""
    own = _calibrated(other, replace(config, statistics=None), batch).statistics
    if config.statistics is None or own is None:
        return config
    return replace(config, statistics=type(own)(config.statistics, config.statistics.tokens, own.identity))


@check
def check_foreign_caches_are_recognised(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch, end: int
) -> Margin:
    """A cache that was filled without a freeze, or under another one, is told when it is used under the freeze.

    By a `StaleCacheWarning`, or, where query heads have KV heads of their own, by a `CircuitFreezeError`: the latter
    must be where only some of the query heads that read a KV head see it frozen. Another freeze is one that differs in
    strength, circuit, heads, replacement or seed. So is a cache told that has grown without the freeze. One that was
    filled under the same freeze is used without either, when it is copied, cropped, reordered, and when the freeze is
    installed anew, too.

    Args:
        end: the column before which the cache ends.

    Raises:
        ClaimBroken: a foreign cache is used without a word, or an own one is not.
        NotApplicable: the unfrozen model has no cache to go on from.
    """
    claim = Claim("a cache of another freeze is recognised")
    rows, length = batch.input_ids.shape
    demand_decoding(engine, model, batch, [end, length])
    config = _calibrated(model, config, batch)
    splits = any(_splits_a_group(site, config) for site in sites(model).values())
    due = ("CircuitFreezeError",) if splits else ("StaleCacheWarning", "CircuitFreezeError")
    with attention_implementation(model, implementations(model)[0]), torch.no_grad():

        def filled(call: Callable[..., Any]) -> Any:
            return go_on(call, model, batch, 0, end)[1]

        def use(call: Callable[..., Any], cache: Any, start: int = end) -> str:
            return told(lambda: go_on(call, model, batch, start, length, cache))

        def use_changed(call: Callable[..., Any]) -> str:
            def run() -> None:
                cache = copy.deepcopy(go_on(call, model, batch, 0, 2)[1])  # no window has let go of any of it
                cache.crop(-1)
                cache.reorder_cache(torch.arange(rows).flip(0))
                go_on(call, model, batch, 1, length, cache)

            return told(run)

        foreign = {"no freeze": (filled(model), due)}
        for name, one in other_freezes(model, config).items():
            with suppress(Refused), engine.freeze(model, one) as other:  # what is offered need not be each of them
                foreign[name] = filled(other), due if one.kv_scope != config.kv_scope else ("StaleCacheWarning",)
        with engine.freeze(model, config) as frozen:
            own = filled(frozen)
            found = use(frozen, copy.deepcopy(own))
            claim.demand(not found, f"a copy of a cache of the same freeze: {found}")
            changed = use_changed(frozen)
            for name, (cache, how) in foreign.items():
                found = use(frozen, cache)
                claim.demand(found.startswith(how), f"a cache of {name}: {found or 'not a word'}, {how[0]} was due")
        if changed and not use_changed(model):
            claim.broken(f"a cache of the same freeze, cropped and reordered: {changed}")
        grown = copy.deepcopy(own)
        grows = end + 1 < length and not told(lambda: go_on(model, model, batch, end, end + 1, grown))
        with engine.freeze(model, config) as frozen:
            found = use(frozen, own)
            claim.demand(not found, f"a cache of the same freeze, which was installed anew: {found}")
            found = use(frozen, grown, end + 1) if grows else ""
            claim.demand(not grows or found.startswith("Stale"), f"one that grew without it: {found or 'not a word'}")
    return claim.margin


def _splits_a_group(site: Site, config: InterventionConfig) -> bool:
    """Whether a KV head is frozen for some of the query heads that read it and not for others."""
    if not unshares(site, config):
        return False
    readers = [set(range(first, first + site.group)) for first in range(0, site.heads, site.group)]
    frozen = [set(chosen_heads(site, config, role)) for role in ROLES if role != "q"]
    return any(one & heads and one - heads for one in readers for heads in frozen)


@check
def check_recomputation_is_the_same_pass(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch, other: Batch
) -> Margin:
    """Gradients are the same, bit for bit, where gradient checkpointing runs layers again in the backward pass.

    Args:
        batch, other: both passes are outstanding when the backward pass begins.

    Raises:
        ClaimBroken: they are not, and the unfrozen model's are.
        NotApplicable: the model has no gradient checkpointing, or the unfrozen model's are not.
    """
    claim = Claim("what is run again for its gradient is the same pass")
    if not isinstance(model, PreTrainedModel) or not model.supports_gradient_checkpointing:
        raise NotApplicable(f"{type(model).__name__} has no gradient checkpointing")
    _demand_recomputation(model, batch)

    def compare(claim: Claim, which: InterventionConfig | None) -> None:
        want = _gradients(engine, model, which, [batch, other])
        with _checkpointing(model):
            got = _gradients(engine, model, which, [batch, other])
        for name, gradient in got.items():
            claim.same(f"gradient of {name}", gradient, want[name])

    claim.compared(compare, config)
    return claim.margin


_RECOMPUTES: WeakSet[PreTrainedModel] = WeakSet()
"""The models that were seen to run attention again in the backward pass."""


def _demand_recomputation(model: PreTrainedModel, batch: Batch) -> None:
    """Demands, once a model, that gradient checkpointing runs attention again: the claim would be empty without.

    Raises:
        CannotJudge: it does not.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if model in _RECOMPUTES or not parameters:
        return
    runs: list[str] = []
    with ExitStack() as stack, _checkpointing(model), _training(model):
        for site in sites(model).values():
            stack.callback(site.module.register_forward_pre_hook(lambda *_: runs.append("run")).remove)
        loss = model(**batch.arguments(model)).logits.square().mean()
        forward = len(runs)
        torch.autograd.grad(loss, parameters, allow_unused=True)
    if len(runs) == forward:
        raise CannotJudge(f"gradient checkpointing of {type(model).__name__} was switched on, and nothing ran again")
    _RECOMPUTES.add(model)


def _gradients(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig | None, several: Sequence[Batch]
) -> dict[str, Tensor]:
    """The parameters' gradients, by name, of the mean squares of the logits of `several` batches."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def run(call: Callable[..., Any]) -> dict[str, Tensor]:
        squares = [call(**batch.arguments(model)).logits[batch.real].square().mean() for batch in several]
        total = torch.stack(squares).sum()
        if not total.requires_grad:
            raise NotApplicable(f"the logits of {type(model).__name__} depend on no parameter that requires a gradient")
        found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        return {
            name: torch.zeros_like(one) if grad is None else grad
            for (name, one), grad in zip(parameters.items(), found, strict=True)
        }

    with attention_implementation(model, implementations(model)[0]), _training(model):
        if config is None:
            return run(model)
        with engine.freeze(model, config) as frozen:
            return run(frozen)


@contextmanager
def _training(model: PreTrainedModel) -> Iterator[None]:
    """Training mode, with the same draws each time, for the length of the block."""
    was = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            model.train()
            yield
        finally:
            for module, training in was:
                module.training = training


CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")
"""What transformers sets on each module that runs its layers again."""


@contextmanager
def _checkpointing(model: PreTrainedModel) -> Iterator[None]:
    """Gradient checkpointing for the length of the block; no trace of it is left."""
    was = [
        (module, {name: vars(module)[name] for name in CHECKPOINTING if name in vars(module)})
        for module in model.modules()
    ]
    try:
        model._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=False))
        yield
    finally:
        for module, own in was:
            for name in CHECKPOINTING:
                vars(module).pop(name, None)
            vars(module).update(own)
