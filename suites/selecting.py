"""Selecting: the same layers and heads, named in another way, are the same freeze."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.claims import Claim, Margin, NotApplicable, check
from pytest_circuitfreeze.suites.judge.observed_passes import run_pass
from pytest_circuitfreeze.suites.judge.site_lookup import sites

if TYPE_CHECKING:
    from freeze_core import InterventionConfig
    from pytest_circuitfreeze.engines import Engine

__all__ = ["check_indices_are_read_as_in_python"]


@check
def check_indices_are_read_as_in_python(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch
) -> Margin:
    """Negative indices count from the end, no heads are all heads, no layers all that have attention.

    Args:
        config: names one layer, and heads that every layer has, from the front; no statistics or reference of its own.

    Raises:
        ClaimBroken: two configs that ask for the same differ in a bit of the logits.
        NotApplicable: the config is another.
    """
    claim = Claim("the same layers and heads are the same freeze")
    layers, heads = list(config.layer_indices or ()), list(config.head_indices or ())
    held = config.statistics is not None or config.reference is not None
    if len(layers) != 1 or not heads or min(layers + heads) < 0 or held:
        raise NotApplicable("it is about a config that names one layer and its heads, and holds nothing recorded")
    known = sites(model)
    site = known[layers[0]]
    every_layer = replace(config, layer_indices=sorted(known))
    every_head = replace(config, head_indices=[*range(site.heads)])
    from_the_end = [at - site.layers for at in layers], [at - site.heads for at in heads]
    for what, named, otherwise in (
        ("counted from the end", config, replace(config, layer_indices=from_the_end[0], head_indices=from_the_end[1])),
        ("of no layers named", every_layer, replace(config, layer_indices=None)),
        ("of no heads named", every_head, replace(config, head_indices=None)),
    ):
        want, got = (run_pass(engine, model, one, batch).logits for one in (named, otherwise))
        claim.same(f"logits {what}", got, want, "row position word")
    return claim.margin
