"""Locality: other heads, earlier layers, earlier positions and other rows do not notice."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from pytest_circuitfreeze.strategies import Batch
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
            for role in ROLES:
                what = f"{role} of layer {layer}"
                claim.same(what, after.qkv[role], before.qkv[role], "batch head token feature")
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
    other = batch.input_ids.clone()
    other[:, column:] = (other[:, column:] + 1) % model.config.vocab_size
    want = look(engine, model, config, batch).logits[:, :column]
    got = look(engine, model, config, Batch(other, batch.attention_mask)).logits[:, :column]
    real = batch.real[:, :column]
    bound = largest_change(want[real], nudged_look(engine, model, config, batch).logits[:, :column][real])
    claim.within("logits", got[real], want[real], bound, "real word")
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
    together = look(engine, model, config, batch).logits
    moved = nudged_look(engine, model, config, batch).logits
    for row, real in enumerate(batch.real):
        mask = None if batch.attention_mask is None else batch.attention_mask[[row]]
        alone = look(engine, model, config, Batch(batch.input_ids[[row]], mask)).logits[0]
        bound = largest_change(together[row][real], moved[row][real])
        claim.within(f"logits of row {row}", alone[real], together[row][real], bound, "real word")
    return claim.margin


def _demand_no_statistics(claim: Claim, config: InterventionConfig) -> None:
    of_the_pass = config.freeze_type == "mean" or (config.freeze_type == "noise" and config.noise_std is None)
    claim.demand(not of_the_pass, "asked about a freeze to statistics of the pass, which every token enters")
