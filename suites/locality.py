"""Locality: other heads, earlier layers, earlier positions and other rows do not notice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pytest_circuitfreeze.strategies import Batch, vocabulary
from pytest_circuitfreeze.suites.claims import Claim, Margin
from pytest_circuitfreeze.suites.independence import first_frozen, unshares
from pytest_circuitfreeze.suites.judge.anatomy import ROLES
from pytest_circuitfreeze.suites.judge.oracle import chosen_heads
from pytest_circuitfreeze.suites.judge.passes import look
from pytest_circuitfreeze.suites.judge.rounding import largest_change, nudged_look

if TYPE_CHECKING:
    from freeze_core import InterventionConfig
    from pytest_circuitfreeze.engines import Engine

__all__ = [
    "check_earlier_layers_are_untouched",
    "check_later_tokens_do_not_matter",
    "check_other_heads_are_untouched",
    "check_rows_do_not_matter",
]


def check_other_heads_are_untouched(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch
) -> Margin:
    """In the first frozen layer, z of every query head that reads no frozen activation is the unfrozen model's.

    Bit for bit; within rounding where KV heads are un-shared.

    Raises:
        ClaimBroken: such a head's z moved.
    """
    claim = Claim(
        "heads that read nothing frozen are untouched", model=model, engine=engine, config=config, batch=batch
    )
    site = first_frozen(model, config)
    frozen = {head for role in ROLES for head in chosen_heads(site, config, role)}
    clean, seen = (look(engine, model, which, batch).layers[site.layer].mixed() for which in (None, config))
    moved = clean
    if unshares(site, config):
        moved = nudged_look(engine, model, None, batch).layers[site.layer].mixed()
    for head in sorted(set(range(site.heads)) - frozen):
        bound = largest_change(clean[:, :, head], moved[:, :, head])
        what = f"z of head {head} in layer {site.layer}"
        claim.within(what, seen[:, :, head], clean[:, :, head], bound, "batch token feature")
    return claim.margin


def check_earlier_layers_are_untouched(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch
) -> Margin:
    """All that attention consumes in the layers before the first frozen one, and that one's input, bit for bit.

    Raises:
        ClaimBroken: something moved.
    """
    claim = Claim("layers before the frozen one are untouched", model=model, engine=engine, config=config, batch=batch)
    first = first_frozen(model, config)
    clean, seen = (look(engine, model, which, batch) for which in (None, config))
    for layer in (layer for layer in clean.layers if layer <= first.layer):
        before, after = clean.layers[layer], seen.layers[layer]
        claim.same(f"input of layer {layer}", after.hidden, before.hidden, "batch token feature")
        if layer < first.layer:
            claim.same(f"z of layer {layer}", after.mixed(), before.mixed(), "batch token head feature")
            for what, used in before.consumed().items():
                claim.same(f"{what} of layer {layer}", after.consumed()[what], used)
    return claim.margin


def check_later_tokens_do_not_matter(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch, column: int
) -> Margin:
    """Logits of columns before `column` stay when the tokens from `column` on are others, within rounding.

    Args:
        config: to `zero`, or to `noise` with a `noise_std`: no statistics of the pass.

    Raises:
        ClaimBroken: they move.
    """
    claim = Claim(
        "no position depends on later tokens", model=model, engine=engine, config=config, batch=batch, column=column
    )
    _demand_no_statistics(claim, config)
    ids = batch.input_ids.clone()
    ids[:, column:] = (ids[:, column:] + 1) % vocabulary(model)
    other = Batch(ids, batch.attention_mask)
    real = batch.real[:, :column]

    def before(which: InterventionConfig | None) -> tuple[Tensor, Tensor, float | Tensor]:
        want, got = (look(engine, model, which, each).logits[:, :column][real] for each in (batch, other))
        moved = nudged_look(engine, model, which, batch).logits[:, :column][real]
        return got, want, largest_change(want, moved)

    claim.compared("logits", before, config, "real word")
    return claim.margin


def check_rows_do_not_matter(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch
) -> Margin:
    """Each row's logits are what they are when the row is run alone, within rounding.

    Args:
        config: to `zero`, or to `noise` with a `noise_std`: no statistics of the pass.

    Raises:
        ClaimBroken: they are not.
    """
    claim = Claim("no row depends on the others", model=model, engine=engine, config=config, batch=batch)
    _demand_no_statistics(claim, config)
    masks = [None if batch.attention_mask is None else mask[None] for mask in batch.real.long()]
    alone = [Batch(ids[None], mask) for ids, mask in zip(batch.input_ids, masks, strict=True)]

    def rows(which: InterventionConfig | None) -> tuple[Tensor, Tensor, float | Tensor]:
        got = [look(engine, model, which, row).logits[0] for row in alone]
        want, moved = look(engine, model, which, batch).logits, nudged_look(engine, model, which, batch).logits
        real = list(batch.real)
        bounds = [
            want.new_full((int(at.sum()), 1), largest_change(one[at], off[at]))
            for one, off, at in zip(want, moved, real, strict=True)
        ]
        own = torch.cat([one[at] for one, at in zip(got, real, strict=True)])
        return own, want[batch.real], torch.cat(bounds)

    claim.compared("logits", rows, config, "real word")
    return claim.margin


def _demand_no_statistics(claim: Claim, config: InterventionConfig) -> None:
    of_the_pass = config.freeze_type == "mean" or (config.freeze_type == "noise" and config.noise_std is None)
    claim.demand(not of_the_pass, "asked about a freeze to statistics of the pass, which every token enters")
