"""Hooks: what others have put on a model stays there under a freeze, and is called."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.claims import Claim, Margin, check
from pytest_circuitfreeze.suites.independence import first_frozen
from pytest_circuitfreeze.suites.judge.passes import logits_of
from pytest_circuitfreeze.suites.judge.sites import standing_in

if TYPE_CHECKING:
    from freeze_core import InterventionConfig
    from pytest_circuitfreeze.engines import Engine

__all__ = ["check_hooks_of_others_stay"]


@check
def check_hooks_of_others_stay(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch
) -> Margin:
    """Hooks on a frozen layer's modules, one of before the freeze and one of during it, see each pass and stay.

    In a model that runs in place of another there is none of before.

    Raises:
        ClaimBroken: one was not called, or is gone.
    """
    claim = Claim("hooks of others stay")
    site = first_frozen(model, config)
    called: list[str] = []
    with ExitStack() as stack, torch.no_grad():

        def watch(module: nn.Module, name: str) -> RemovableHandle:
            handle = module.register_forward_pre_hook(lambda *_: called.append(name))
            stack.callback(handle.remove)
            return handle

        before = watch(site.output, "of before the freeze")
        with engine.freeze(model, config) as frozen:
            stand_in = getattr(frozen, "stand_in", None)
            if stand_in is not None:
                site = standing_in({0: site}, model, stand_in)[0]
            during = watch(site.module, "of during the freeze")
            due = {"of during the freeze"} | ({"of before the freeze"} if stand_in is None else set())
            for number in (1, 2):
                called.clear()
                logits_of(frozen, model, batch)
                missed = sorted(due - set(called))
                claim.demand(not missed, f"a hook {' and one '.join(missed)} was not called in pass {number}")
        for when, handle in (("before", before), ("during", during)):
            there = handle.id in (handle.hooks_dict_ref() or ())
            claim.demand(there, f"a hook of {when} the freeze is gone")
    return claim.margin
