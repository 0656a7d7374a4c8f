"""Hooks: what others have put on a model stays there under a freeze, is called, and counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.claims import Claim, Margin, check
from pytest_circuitfreeze.suites.independence import first_frozen, unshares
from pytest_circuitfreeze.suites.judge.judged_sites import Site
from pytest_circuitfreeze.suites.judge.observed_passes import logits_of, unfrozen
from pytest_circuitfreeze.suites.judge.site_lookup import sites
from pytest_circuitfreeze.suites.locality import compare_other_heads
from pytest_circuitfreeze.suites.tolerance import nudged

if TYPE_CHECKING:
    from freeze_core import InterventionConfig
    from pytest_circuitfreeze.engines import Engine

__all__ = ["check_hooks_of_others_stay"]


@check
def check_hooks_of_others_stay(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch
) -> Margin:
    """Hooks on a frozen layer's modules, of before the freeze and of during it, see each pass, stay and count.

    They are on the attention, its projections and its output projection, before their forwards and behind them. What
    hooks of before the freeze make of q, k and v is what heads that read nothing frozen go on from: their z is that of
    the unfrozen model under the same hooks, bit for bit; within rounding where KV heads are un-shared.

    In a model that runs in place of another there is none of before.

    Raises:
        ClaimBroken: one was not called, is gone, or what it gave was passed over.
    """
    claim = Claim("hooks of others stay")
    site = first_frozen(model, config)
    with torch.no_grad():
        _demand_called(claim, engine, model, config, batch, site)
    # The copy that shows how far rounding goes has to run under the hooks, too, and is to be made without them.
    hooked = [site, *([sites(nudged(model))[site.layer]] if unshares(site, config) else [])]
    with ExitStack() as stack:
        for module in (module for each in hooked for module in each.sources.values()):
            stack.callback(module.register_forward_hook(_add).remove)
        compare_other_heads(claim, "z under a hook that adds to q, k and v", engine, model, config, batch)
    return claim.margin


def _add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + 1


def _demand_called(
    claim: Claim, engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch, site: Site
) -> None:
    """Demands that the hooks that an unfrozen pass calls are called in each frozen one, and are there in the end."""
    plain = unfrozen(engine, model)
    with _Watch(_run_by(plain, site)) as watch:
        logits_of(plain, model, batch)
        due = watch.called
    with ExitStack() as stack:
        before = stack.enter_context(_Watch(site))
        with engine.freeze(model, config) as frozen:
            running = _run_by(frozen, site)
            during = stack.enter_context(_Watch(running))
            watches = {"before": before, "during": during} if running is site else {"during": during}
            for number in (1, 2):
                before.called.clear()
                during.called.clear()
                logits_of(frozen, model, batch)
                missed = [f"{name} of {when} the freeze" for when, own in watches.items() for name in due - own.called]
                claim.demand(not missed, f"not called in pass {number}: {_such_as(missed)}")
        gone = [f"{name} of before the freeze" for name in before.gone()]
        gone += [f"{name} of during the freeze" for name in during.gone()]
        claim.demand(not gone, f"not there any more: {_such_as(gone)}")


def _run_by(call: Callable[..., Any], site: Site) -> Site:
    """A layer in what `call` runs, which may be another model in the place of its own."""
    stand_in = getattr(call, "stand_in", None)
    return site if stand_in is None else site.moved_to(stand_in)


def _such_as(hooks: Sequence[str]) -> str:
    return f"{len(hooks)} hooks, such as the {'; the '.join(sorted(hooks)[:2])}"


class _Watch(ExitStack):
    """Hooks on a layer's attention, projections and output projection, before and behind their forwards."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.called: set[str] = set()
        self._handles: dict[str, RemovableHandle] = {}
        modules = {"the attention": site.module, **site.sources, "the output projection": site.output}
        for name, module in modules.items():
            self._put(f"forward pre-hook of {name}", module.register_forward_pre_hook)
            self._put(f"forward hook of {name}", module.register_forward_hook)

    def _put(self, name: str, register: Callable[[Callable[..., None]], RemovableHandle]) -> None:
        self._handles[name] = register(lambda *_: self.called.add(name))
        self.callback(self._handles[name].remove)

    def gone(self) -> list[str]:
        """The hooks that somebody else has removed."""
        return [name for name, handle in self._handles.items() if handle.id not in (handle.hooks_dict_ref() or ())]
