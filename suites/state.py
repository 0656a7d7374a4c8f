"""State: a freeze touches no parameter, no flag, no generator and no input, and follows no config that is changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.claims import Claim, Margin, check
from pytest_circuitfreeze.suites.judge.judged_sites import Site
from pytest_circuitfreeze.suites.judge.layer_calls import hidden_of
from pytest_circuitfreeze.suites.judge.observed_passes import logits_of
from pytest_circuitfreeze.suites.judge.site_lookup import sites
from pytest_circuitfreeze.suites.judge.visible_state import (
    changes,
    parameters_state,
    training_flags,
    training_flags_kept,
)

if TYPE_CHECKING:
    from freeze_core import InterventionConfig
    from pytest_circuitfreeze.engines import Engine

__all__ = [
    "check_changed_configs_do_not_matter",
    "check_generators_are_untouched",
    "check_inputs_are_not_written_to",
    "check_parameters_are_untouched",
]


@check
def check_parameters_are_untouched(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch, training: bool = False
) -> Margin:
    """While a freeze is on, before and after a pass, parameters and training flags are the unfrozen model's.

    Args:
        training: whether the model is in training mode meanwhile.

    Raises:
        ClaimBroken: a parameter or flag is not what it was.
    """
    claim = Claim("a freeze touches no parameter and no flag")
    with training_flags_kept(model):
        model.train(training)
        before = {**parameters_state(model), **training_flags(model)}
        with engine.freeze(model, config) as frozen:
            _demand_unchanged(claim, before, model, "when installed")
            with torch.random.fork_rng(devices=[]):  # dropout draws when training
                logits_of(frozen, model, batch)
            _demand_unchanged(claim, before, model, "after a pass")
        _demand_unchanged(claim, before, model, "when removed")
    return claim.margin


def _demand_unchanged(claim: Claim, before: dict[str, object], model: PreTrainedModel, when: str) -> None:
    found = changes(before, {**parameters_state(model), **training_flags(model)})
    claim.demand(not found, f"{when}: {'; '.join(found[:3])}")


@check
def check_generators_are_untouched(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch
) -> Margin:
    """Torch's generator is, after install, pass and removal, where it was before, and the logits do not depend on it.

    Raises:
        ClaimBroken: it moved, or they do.
    """
    claim = Claim("torch's generators are untouched")
    logits = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for seed in (0, 1):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            with engine.freeze(model, config) as frozen:
                claim.demand(torch.equal(torch.get_rng_state(), before), "the CPU's generator moved when installed")
                logits.append(logits_of(frozen, model, batch))
            claim.demand(torch.equal(torch.get_rng_state(), before), "the CPU's generator moved in the pass")
    claim.same("logits after another manual_seed", logits[1], logits[0], "row position word")
    return claim.margin


@check
def check_inputs_are_not_written_to(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch
) -> Margin:
    """A frozen pass writes into nothing that the model was called with, a layer was handed or its projections gave.

    Hooks of before the freeze hold it; of what a projection gave, that is before a hook of the freeze has seen it.

    Raises:
        ClaimBroken: a tensor was written to, by its version counter or its values.
    """
    claim = Claim("a freeze writes to no one's tensors")
    with _Holder(sites(model)) as holder:
        plain = holder.of_pass(model, model, batch)
        own = {(one.what, one.layer) for one in plain if one.tensor._version != one.version}
        with engine.freeze(model, config) as frozen:
            held = holder.of_pass(frozen, model, batch)
    for one in held:
        if (one.what, one.layer) in own:  # what the unfrozen model writes to itself is no claim about a freeze
            continue
        where = {} if one.layer is None else {"layer": one.layer}
        claim.same(one.what, one.tensor, one.values, one.axes, **where)
        claim.demand(one.tensor._version == one.version, f"{one.what} was written to", **where)
    return claim.margin


@check
def check_changed_configs_do_not_matter(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch
) -> Margin:
    """A live freeze gives the same logits, bit for bit, after its config, and the lists in it, were changed.

    Args:
        config: names its layers and heads; a copy of it is what is frozen and changed.

    Raises:
        ClaimBroken: it gives others.
    """
    claim = Claim("a live freeze does not follow its config")
    known = sites(model)
    layers, heads = list(config.layer_indices or ()), list(config.head_indices or ())
    claim.demand(bool(layers and heads), "asked about a config that leaves layers or heads open")
    live = replace(config, layer_indices=layers, head_indices=heads)
    with torch.no_grad(), engine.freeze(model, live) as frozen:
        want = logits_of(frozen, model, batch)
        layers[:], heads[:] = sorted(known), range(known[layers[0]].heads)
        live.circuit = "ov" if str(config.circuit) == "qk" else "qk"
        live.strength, live.seed = config.strength / 2, config.seed + 1
        got = logits_of(frozen, model, batch)
    claim.same("logits after the config was changed", got, want, "row position word")
    return claim.margin


class _Held(NamedTuple):
    """A tensor that was handed over, in which layer if not to the model, and what it was then."""

    what: str
    layer: int | None
    tensor: Tensor
    values: Tensor
    version: int

    @property
    def axes(self) -> str:
        """Names of the tensor's dimensions, where they are known."""
        if self.layer is None:
            return "row position"
        return "row position feature" if self.tensor.dim() == 3 else ""


class _Holder(ExitStack):
    """Holds what attention layers are handed and what their projections give, for the length of the block."""

    def __init__(self, known: Mapping[int, Site]) -> None:
        super().__init__()
        self.held: list[_Held] = []
        for layer, site in known.items():
            hold = partial(self.hold_hidden, layer)
            self.callback(site.module.register_forward_pre_hook(hold, with_kwargs=True).remove)
            for path, module in site.sources.items():
                self.callback(module.register_forward_hook(partial(self.hold_output, layer, path)).remove)

    def of_pass(self, call: Callable[..., Any], model: PreTrainedModel, batch: Batch) -> list[_Held]:
        """What `call` and the layers of `model` were handed in one pass, and what was given."""
        self.held = []
        arguments = batch.arguments(model)
        for name, value in arguments.items():
            self.hold(name, value)
        with torch.no_grad():
            call(**arguments)
        return self.held

    def hold_hidden(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.hold("input", hidden_of(args, kwargs), layer)

    def hold_output(self, layer: int, path: str, module: nn.Module, args: Any, output: object) -> None:
        self.hold(f"output of {path}", output, layer)

    def hold(self, what: str, value: object, layer: int | None = None) -> None:
        if isinstance(value, Tensor):
            self.held.append(_Held(what, layer, value, value.clone(), value._version))
