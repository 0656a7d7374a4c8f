"""Gradient modes, by their identities: `dx = (1 - a) dx'` for stopgrad, `dx = dx'` for straight-through.

`circuit_ste` goes further back: what arrives at z is carried through the attention as it is without the freeze.

Both are seen from outside, without knowing where an engine cut the graph. What arrives at q, k and v as attention
used them is `dx'`; what leaves is the gradient of the projections' weights and of the layer's input, which is `dx`
times the input and `dx` times the weights. The oracle carries the one to the other by the estimator's definition, in
float64.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from pytest_circuitfreeze.recordings import moved_to
from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.claims import Claim, ClaimBroken, Margin, NotApplicable, check
from pytest_circuitfreeze.suites.judge.expected_replacements import material_of
from pytest_circuitfreeze.suites.judge.judged_sites import Site
from pytest_circuitfreeze.suites.judge.observed_passes import (
    attention_implementation,
    logits_of,
    observe,
    of_real_tokens,
)
from pytest_circuitfreeze.suites.judge.oracle import Gradients, judged_layers, pulled_back
from pytest_circuitfreeze.suites.judge.replay import Replay
from pytest_circuitfreeze.suites.judge.rounding import largest_change, run_nudged_pass
from pytest_circuitfreeze.suites.judge.site_lookup import implementations, sites, sites_without_formula
from pytest_circuitfreeze.suites.replays import compare_gradients_with_replay
from pytest_circuitfreeze.suites.tolerance import Nudge, nudged
from pytest_circuitfreeze.wrapped import device_of

if TYPE_CHECKING:
    from freeze_core import InterventionConfig
    from pytest_circuitfreeze.engines import Engine

__all__ = [
    "check_backward_modes_share_the_forward",
    "check_gradients_are_the_estimators",
    "weighted_sum",
    "without_gradients",
]


@check
def check_gradients_are_the_estimators(
    engine: Engine, model: PreTrainedModel, configs: Sequence[InterventionConfig], batch: Batch
) -> Margin:
    """In frozen layers, and in the one after, gradients are the estimators'; no parameter lost its own.

    Exactly zero where they are due to be; within rounding elsewhere. Forward mode gives the derivative that reverse
    mode gives, where the model's operations have derivatives in forward mode.

    Raises:
        ClaimBroken: they are not.
    """
    claim = Claim("gradients are the estimators'")
    known = sites(model)
    if any(str(config.backward_mode) == "circuit_ste" for config in configs):
        known = sites_without_formula(model)  # attention may run twice: what it was given and what came of it counts
    material = material_of(engine, model, configs, batch)
    with without_gradients(model), attention_implementation(model, implementations(model)[0]):
        with engine.freeze(model, configs) as frozen, torch.enable_grad(), _running(model) as ran:
            with _embedded(frozen, model, _keep_gradient) as embedded:
                found = observe(frozen, model, batch, known, gradients=True)
            weighted_sum(found.logits, batch).backward()
            directions = [_gradient(one) for one in embedded]
            # None where the engine has removed the hook on the embeddings.
            along = _tangents(frozen, model, batch, directions) if directions else None
        if along is not None:
            _compare_modes(claim, engine, model, configs, batch, directions, along)
        ran |= {
            module for site in known.values() for module in site.module.modules()
        }  # no engine is to leave these out
        _demand_gradients(claim, model, batch, ran)
        real = batch.real.to(device_of(model))
        judged = [layer for layer in judged_layers(known, configs) if not found.layers[layer].shared]
        if not judged:
            raise NotApplicable(
                "later layers read the keys and values of all frozen layers, whose gradients are not theirs alone"
            )
        for layer in judged:
            site, seen = known[layer], found.layers[layer]
            if site.formula is None:
                # A model that loops over its layers keeps gradients of the last runs alone.
                runs = [run for run in found.runs[layer] if run.answer is not None]
                compare_gradients_with_replay(
                    claim, [Replay(model, site, run, real, configs, material) for run in runs]
                )
                continue
            exact = pulled_back(site, seen, real, configs, material)
            moved = pulled_back(site, seen, real, configs, material, Nudge(seen.hidden.dtype))
            _compare(claim, site, _gradient(seen.hidden), exact, moved)
    return claim.margin


@check
def check_backward_modes_share_the_forward(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch
) -> Margin:
    """While gradients are kept, the logits are the same in every backward mode: bit for bit at strength 1.

    At other strengths within rounding, since `x + strength * (r - x)` may be worked out in another order.

    Raises:
        ClaimBroken: they are not.
    """
    claim = Claim("backward modes share the forward")
    logits = {}
    for mode in ("stopgrad", "ste", "circuit_ste"):
        with torch.enable_grad(), engine.freeze(model, replace(config, backward_mode=mode)) as frozen:
            logits[mode] = of_real_tokens(logits_of(frozen, model, batch), batch)
    want, bound = logits.pop("stopgrad"), 0.0
    if config.strength < 1:
        moved = run_nudged_pass(engine, model, config, batch).logits
        bound = largest_change(want, of_real_tokens(moved, batch))
    for mode, got in logits.items():
        claim.within(f"logits under {mode}", got, want, bound, "row position word")
    return claim.margin


def _compare_modes(
    claim: Claim,
    engine: Engine,
    model: PreTrainedModel,
    configs: Sequence[InterventionConfig],
    batch: Batch,
    directions: Sequence[Tensor],
    along: Tensor,
) -> None:
    """Demands that forward mode gives `along` the gradients `directions` what reverse mode gives: their squares.

    Nothing is demanded where the unfrozen model breaks it, too.
    """
    twin = nudged(model)
    moved_configs = [moved_to(config, twin) for config in configs]
    with (
        engine.freeze(twin, moved_configs) as frozen,
        attention_implementation(twin, implementations(twin)[0]),
        torch.enable_grad(),
    ):
        moved = _tangents(frozen, twin, batch, directions)
    want, bound = _squares(directions), 0.0 if moved is None else (along - moved).abs().sum()
    try:
        claim.within("derivative in forward mode", along.sum(), want, bound)
    except ClaimBroken:
        with without_gradients(model), torch.enable_grad(), _embedded(model, model, _keep_gradient) as embedded:
            weighted_sum(model(**batch.arguments(model)).logits, batch).backward()
        own = [_gradient(one) for one in embedded]
        unfrozen = _tangents(model, model, batch, own)
        if unfrozen is not None and abs(float(unfrozen.sum() - _squares(own))) <= float(bound):
            raise


def _squares(gradients: Sequence[Tensor]) -> Tensor:
    return torch.stack([one.double().square().sum() for one in gradients]).sum()


def _tangents(
    call: Callable[..., Any], model: PreTrainedModel, batch: Batch, directions: Sequence[Tensor]
) -> Tensor | None:
    """What the terms of `weighted_sum` change by as what is embedded moves along `directions`, in float64.

    `None` where an operation has no derivative in forward mode.
    """
    turns = iter(directions)
    # Torch warns of what its own rules for tangents are made with; of its attention kernels one alone has a rule.
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH), torch.autograd.forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        with _embedded(call, model, lambda one: torch.autograd.forward_ad.make_dual(one, next(turns))):
            try:
                terms = _weighted(call(**batch.arguments(model)).logits, batch)
            except NotImplementedError:
                return None
        primal, tangent = torch.autograd.forward_ad.unpack_dual(terms)
        return torch.zeros_like(primal, dtype=torch.float64) if tangent is None else tangent.detach().double()


@contextmanager
def _embedded(
    call: Callable[..., Any], model: PreTrainedModel, change: Callable[[Tensor], Tensor]
) -> Iterator[list[Tensor]]:
    """Collects what the tokens are embedded as, changed by `change`."""
    found: list[Tensor] = []

    def embed(module: nn.Module, args: object, output: Tensor) -> Tensor:
        found.append(change(output))
        return found[-1].clone()  # some models (CTRL) scale it in place

    running: PreTrainedModel = getattr(call, "stand_in", None) or model
    # A wrapper around a model of transformers has no such method itself.
    embeds: Any = next(module for module in running.modules() if hasattr(module, "get_input_embeddings"))
    handle = embeds.get_input_embeddings().register_forward_hook(embed)
    try:
        yield found
    finally:
        handle.remove()


def _keep_gradient(embedded: Tensor) -> Tensor:
    embedded = embedded if embedded.requires_grad else embedded.detach().requires_grad_()
    embedded.retain_grad()
    return embedded


def _compare(claim: Claim, site: Site, of_input: Tensor, exact: Gradients, moved: Gradients) -> None:
    """Demands that a layer's gradients are the `exact` ones, as closely as `moved` says that rounding allows."""
    bound = float((exact.hidden - moved.hidden).abs().max())
    claim.within("gradient of the input", of_input, exact.hidden, bound, "row position feature", layer=site.layer)
    for kind, got, due, other, axes in (
        ("weight", site.weights(_learned_gradient), exact.weights, moved.weights, "head feature input"),
        ("bias", site.biases(_learned_gradient), exact.biases, moved.biases, "head feature"),
    ):
        for role, gradient in got.items():
            of_head = (due[role] - other[role]).abs().flatten(1).amax(1)
            bounds = of_head.reshape(-1, *[1] * (gradient.ndim - 1))
            claim.within(f"gradient of {role}'s {kind}", gradient, due[role], bounds, axes, layer=site.layer)


def weighted_sum(logits: Tensor, batch: Batch) -> Tensor:
    """A number that every logit of a real token enters with a weight of its own, drawn once and for all."""
    return _weighted(logits, batch).sum()


def _weighted(logits: Tensor, batch: Batch) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(logits.shape, generator=generator).to(logits) * batch.real[..., None].to(logits)
    return logits * weights


@contextmanager
def _running(model: PreTrainedModel) -> Iterator[set[nn.Module]]:
    """The modules that run in the block."""
    ran: set[nn.Module] = set()
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_pre_hook(lambda module, _: ran.add(module)).remove)
        yield ran


def _demand_gradients(claim: Claim, model: PreTrainedModel, batch: Batch, ran: set[nn.Module]) -> None:
    """Demands that no parameter's gradient is missing that the unfrozen model has, of modules that `ran`.

    An expert to which no token is routed under the freeze has nothing to learn from it.
    """
    of_those = {parameter for module in ran for parameter in module.parameters(recurse=False)}
    missing = [name for name, one in model.named_parameters() if one.requires_grad and one.grad is None]
    if not missing:
        return
    kept = {name: parameter.grad for name, parameter in model.named_parameters()}
    with without_gradients(model), torch.enable_grad():
        logits = model(**batch.arguments(model)).logits
        if not logits.requires_grad:  # adapters that are merged, say
            return
        weighted_sum(logits, batch).backward()
        lost = [
            name
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and kept[name] is None and parameter in of_those
        ]
    claim.demand(not lost, f"parameters that the unfrozen model has gradients for lost theirs: {', '.join(lost)}")


def _gradient(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def _learned_gradient(parameter: Tensor) -> Tensor | None:
    return _gradient(parameter) if parameter.requires_grad else None


@contextmanager
def without_gradients(model: PreTrainedModel) -> Iterator[None]:
    """Takes the parameters' gradients away for the length of a block, and puts them back."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.grad = None
        yield
    finally:
        for parameter, grad in before:
            parameter.grad = grad
