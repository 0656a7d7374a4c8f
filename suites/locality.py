"""Locality: other heads, earlier layers, earlier positions, other rows and all that is no attention do not notice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pytest_circuitfreeze.strategies import Batch, vocabulary
from pytest_circuitfreeze.suites.claims import Claim, Margin, NotApplicable, check, in_run
from pytest_circuitfreeze.suites.gradients import weighted_sum, without_gradients
from pytest_circuitfreeze.suites.independence import first_frozen, unshares
from pytest_circuitfreeze.suites.judge.judged_sites import ROLES, Site
from pytest_circuitfreeze.suites.judge.observed_passes import (
    Pass,
    Seen,
    attention_implementation,
    observe,
    of_real_tokens,
    run_pass,
    unfrozen,
)
from pytest_circuitfreeze.suites.judge.oracle import chosen_heads
from pytest_circuitfreeze.suites.judge.rounding import largest_change, run_nudged_pass
from pytest_circuitfreeze.suites.judge.site_lookup import implementations, sites, sites_without_formula

if TYPE_CHECKING:
    from freeze_core import InterventionConfig
    from pytest_circuitfreeze.engines import Engine

__all__ = [
    "check_earlier_layers_are_untouched",
    "check_later_tokens_do_not_matter",
    "check_other_heads_are_untouched",
    "check_rows_do_not_matter",
    "check_the_rest_is_untouched",
]


@check
def check_other_heads_are_untouched(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch
) -> Margin:
    """In the first frozen layer, z of every query head that reads no frozen activation is the unfrozen model's.

    Bit for bit; within rounding where KV heads are un-shared.

    Raises:
        ClaimBroken: such a head's z moved.
    """
    claim = Claim("heads that read nothing frozen are untouched")
    compare_other_heads(claim, "z", engine, model, config, batch)
    return claim.margin


def compare_other_heads(
    claim: Claim, what: str, engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch
) -> None:
    """Demands that z of each head of the first frozen layer that reads nothing frozen, called `what`, did not move."""
    site = first_frozen(model, config)
    frozen = {head for role in ROLES for head in chosen_heads(site, config, role)}
    clean, seen = (run_pass(engine, model, which, batch).layers[site.layer].mixed() for which in (None, config))
    moved = clean
    if unshares(site, config):
        moved = run_nudged_pass(engine, model, None, batch).layers[site.layer].mixed()
    for head in sorted(set(range(site.heads)) - frozen):
        bound = largest_change(clean[:, :, head], moved[:, :, head])
        got, want = seen[:, :, head], clean[:, :, head]
        claim.within(what, got, want, bound, "row position feature", layer=site.layer, head=head)


@check
def check_earlier_layers_are_untouched(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch
) -> Margin:
    """All that attention consumes in the layers before the first frozen one, and that one's input, bit for bit.

    Raises:
        ClaimBroken: something moved.
    """
    claim = Claim("layers before the frozen one are untouched")
    first = first_frozen(model, config)
    clean, seen = (run_pass(engine, model, which, batch) for which in (None, config))
    for layer in (layer for layer in clean.layers if layer <= first.layer):
        before, after = clean.layers[layer], seen.layers[layer]
        claim.same("input", after.hidden, before.hidden, "row position feature", layer=layer)
        if layer < first.layer:
            claim.same("z", after.mixed(), before.mixed(), "row position head feature", layer=layer)
            for what, used in before.consumed().items():
                claim.same(what, after.consumed()[what], used, "row position head feature", layer=layer)
    return claim.margin


@check
def check_the_rest_is_untouched(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch
) -> Margin:
    """Handed the z of the frozen pass, the unfrozen model gives its logits, and its gradients behind the last freeze.

    Of a layer that runs several times in a pass, that is behind its last run.

    Bit for bit: what is frozen reaches the rest of the model through z alone, and the rest is the model's own.

    Raises:
        ClaimBroken: logits differ, or the gradient of what the last frozen layer gave.
    """
    claim = Claim("all but attention is the unfrozen model's")
    known = sites_without_formula(model)
    last = max(at for at, site in sites(model).items() if any(chosen_heads(site, config, role) for role in ROLES))
    with attention_implementation(model, implementations(model)[0]), without_gradients(model), torch.enable_grad():
        with engine.freeze(model, config) as frozen:
            found = _backwards(observe(frozen, model, batch, known, gradients=True), batch)
        if any(
            found.runs[at][-1].shared and any(chosen_heads(site, config, role) for role in ("k", "v"))
            for at, site in sites(model).items()
        ):
            raise NotApplicable("later layers read the keys and values of a frozen layer, and not its z alone")
        call = unfrozen(engine, model)
        with _given_z(call, known, {at: found.runs[at] for at in known if at <= last}):
            due = _backwards(observe(call, model, batch, known, gradients=True), batch)
    claim.same("logits", found.logits, due.logits, "row position word")
    got, want = found.runs[last][-1], due.runs[last][-1]  # nothing is frozen behind the last run of a layer
    if got.answer is not None and want.answer is not None:
        what, axes = "gradient of what attention gave", "row position feature"
        claim.same(what, _gradient(got.answer), _gradient(want.answer), axes, layer=last, **in_run(got.run))
    return claim.margin


def _gradient(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def _backwards(found: Pass, batch: Batch) -> Pass:
    weighted_sum(found.logits, batch).backward()
    return found


@contextmanager
def _given_z(call: Any, known: Mapping[int, Site], runs: Mapping[int, Sequence[Seen]]) -> Iterator[None]:
    """Hands the output projections of these layers the z of these runs, run by run, in place of their own."""
    stand_in = getattr(call, "stand_in", None)
    with ExitStack() as stack:
        for layer, seen in runs.items():
            left = iter([run.mixed().detach() for run in seen])

            def give(_: nn.Module, args: tuple[Tensor, ...], left: Iterator[Tensor] = left) -> tuple[Tensor, ...]:
                return next(left).reshape(args[0].shape), *args[1:]

            site = known[layer] if stand_in is None else known[layer].moved_to(stand_in)
            stack.callback(site.output.register_forward_pre_hook(give).remove)
        yield


@check
def check_later_tokens_do_not_matter(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch, column: int
) -> Margin:
    """Logits of columns before `column` stay when the tokens from `column` on are others, within rounding.

    Args:
        config: to `zero`, or to `noise` with a `noise_std`: no statistics of the pass.

    Raises:
        ClaimBroken: they move.
    """
    claim = Claim("no position depends on later tokens")
    _demand_no_statistics(claim, config)
    ids = batch.input_ids.clone()
    ids[:, column:] = (ids[:, column:] + 1) % vocabulary(model)
    other = Batch(ids, batch.attention_mask)
    first = Batch(batch.input_ids[:, :column], batch.real[:, :column])

    def compare(claim: Claim, which: InterventionConfig | None) -> None:
        passes = [run_pass(engine, model, which, batch), run_pass(engine, model, which, other)]
        passes.append(run_nudged_pass(engine, model, which, batch))
        want, got, moved = (of_real_tokens(each.logits[:, :column], first) for each in passes)
        claim.within("logits", got, want, largest_change(want, moved), "row position word")

    claim.compared(compare, config)
    return claim.margin


@check
def check_rows_do_not_matter(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch
) -> Margin:
    """Each row's logits are what they are when the row is run alone, within rounding.

    Args:
        config: to `zero`, or to `noise` with a `noise_std`: no statistics of the pass.

    Raises:
        ClaimBroken: they are not.
    """
    claim = Claim("no row depends on the others")
    _demand_no_statistics(claim, config)
    masks = [None if batch.attention_mask is None else mask[None] for mask in batch.real.long()]
    alone = [Batch(ids[None], mask) for ids, mask in zip(batch.input_ids, masks, strict=True)]

    def compare(claim: Claim, which: InterventionConfig | None) -> None:
        found = torch.cat([run_pass(engine, model, which, row).logits for row in alone])
        passes = [
            found,
            run_pass(engine, model, which, batch).logits,
            run_nudged_pass(engine, model, which, batch).logits,
        ]
        got, want, moved = (of_real_tokens(logits, batch) for logits in passes)
        bounds = [largest_change(one, off) for one, off in zip(want, moved, strict=True)]
        claim.within("logits", got, want, want.new_tensor(bounds)[:, None, None], "row position word")

    claim.compared(compare, config)
    return claim.margin


def _demand_no_statistics(claim: Claim, config: InterventionConfig) -> None:
    of_the_pass = config.freeze_type == "mean" or (config.freeze_type == "noise" and config.noise_std is None)
    claim.demand(not of_the_pass, "asked about a freeze to statistics of the pass, which every token enters")
