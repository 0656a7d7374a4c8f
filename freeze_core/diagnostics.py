"""Instruments that look at a freeze at work: what it does to gradients, how far it moves the logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from freeze_core.attention.sites import Sites, find_sites
from freeze_core.config import InterventionConfig
from freeze_core.errors import InterventionError
from freeze_core.freezing.frozen import FrozenProjection, frozen_attention
from freeze_core.freezing.install import install, live_freezes
from freeze_core.freezing.plan import resolve
from freeze_core.inputs import logits_of, model_arguments
from freeze_core.vocabulary import BackwardMode

__all__ = ["gradient_behavior", "intervention_effect"]


def gradient_behavior(
    model: nn.Module, test_input: Tensor, config: InterventionConfig, print_table: bool = False
) -> dict[str, Any]:
    """See `AttentionCircuitFreezer.check_gradient_behavior`."""
    sites = find_sites(model)
    arguments = model_arguments(model, test_input)
    with _frozen(sites, config), ExitStack() as stack, torch.enable_grad():
        taps = [stack.enter_context(_tapped(name, one)) for name, one in _projections(sites)]
        loss = logits_of(model(**arguments)).float().square().mean()
        if not loss.requires_grad:
            raise InterventionError("no parameter of the model and not the input requires a gradient: nothing to check")
        parameters = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
        activations = [x for tap in taps for x in (tap["before"], tap["after"]) if x.requires_grad]
        sources = [*(one for _, one in parameters), *activations]
        grads = dict(zip(sources, torch.autograd.grad(loss, sources, allow_unused=True), strict=True))
    of_parameters = {name: grads[one] for name, one in parameters}
    checked = {
        tap["name"]: _identity(tap["projection"], grads.get(tap["before"]), grads.get(tap["after"])) for tap in taps
    }
    lost = [name for name, one in of_parameters.items() if one is None and _belongs(name, list(checked))]
    result = {
        "validation_passed": all(site["passed"] for site in checked.values())
        and not (lost and config.preserve_gradients),
        "loss_value": float(loss.detach()),
        "parameters": {name: _summary(grad) for name, grad in of_parameters.items()},
        "sites": checked,
    }
    if print_table:
        _print(result)
    return result


def intervention_effect(
    model_baseline: nn.Module, model_intervened: nn.Module, test_input: Tensor, config: InterventionConfig
) -> dict[str, Any]:
    """See `AttentionCircuitFreezer.verify_intervention_effect`."""
    if live_freezes(find_sites(model_baseline)):
        raise InterventionError("model_baseline is frozen: remove its freeze, or pass an unfrozen copy of the model")
    sites = find_sites(model_intervened)
    with torch.no_grad():
        clean = logits_of(model_baseline(**model_arguments(model_baseline, test_input)))
        with _frozen(sites, config):
            frozen = logits_of(model_intervened(**model_arguments(model_intervened, test_input)))
    difference = (frozen.double() - clean.double()).abs()
    return {
        "max_absolute_diff": float(difference.max()),
        "mean_absolute_diff": float(difference.mean()),
        "changed": not torch.equal(frozen, clean),
    }


@contextmanager
def _frozen(sites: Sites, config: InterventionConfig) -> Iterator[None]:
    """Frozen with `config`: as the model already is, or for the time being."""
    resolved = resolve(config, sites)
    live = live_freezes(sites)
    if all(freeze in live for freeze in resolved):
        yield
    else:
        with install([(sites, resolved)]):
            yield


def _projections(sites: Sites) -> Iterator[tuple[str, FrozenProjection]]:
    for site in sites.by_layer.values():
        frozen = frozen_attention(site.attention)
        for projection in frozen.projections if frozen else ():
            names = [name for name, module in site.layout.shared.modules.items() if module is projection.module]
            yield f"{site.name}.{names[0]}", projection


@contextmanager
def _tapped(name: str, projection: FrozenProjection) -> Iterator[dict[str, Any]]:
    """Keeps the activation before and after the freeze, with their place in the graph."""
    tap: dict[str, Any] = {"name": name, "projection": projection}
    original = projection.original

    # The first call is the one whose gradient counts: under circuit_ste the attention runs once more, cut off.
    def before(*args: Any, **kwargs: Any) -> Tensor:
        x: Tensor = original(*args, **kwargs)
        tap.setdefault("before", x)
        return x

    def after(module: nn.Module, args: Any, output: Tensor) -> None:
        tap.setdefault("after", output)

    projection.original = before
    hook = projection.module.register_forward_hook(after)
    try:
        yield tap
    finally:
        projection.original = original
        hook.remove()


def _identity(projection: FrozenProjection, dx: Tensor | None, dx_after: Tensor | None) -> dict[str, Any]:
    """`dx = (1 - a) dx'` under `stopgrad` and `dx = dx'` under `ste`, on the frozen features; `dx = dx'` elsewhere.

    Under `circuit_ste` both are of the run that spares the circuit, in which nothing stands between the two.
    """
    if dx is None or dx_after is None:
        return {"passed": dx is dx_after, "deviation": None, "bound": None}
    expected = dx_after.clone()
    exact = projection.source is None
    for edit in projection.edits:
        treatment = edit.treatment
        if treatment.backward_mode == BackwardMode.STOPGRAD:
            expected[..., edit.mask.to(expected.device)] *= 1 - treatment.strength
            exact = exact and treatment.strength == 1
    if projection.source is not None:
        expected = torch.zeros_like(dx).index_add_(-1, projection.source.to(dx.device), expected)
    deviation = float((dx - expected).abs().max())
    # A product by 1 - a and a sum over the query heads of a group round; nothing else does.
    repeats = 1 if projection.source is None else int(projection.source.bincount().max())
    bound = 0.0 if exact else (2 + repeats) * torch.finfo(dx.dtype).eps * repeats * float(dx_after.abs().max())
    return {"passed": deviation <= bound, "deviation": deviation, "bound": bound}


def _belongs(parameter: str, projections: list[str]) -> bool:
    return any(parameter.startswith(f"{name}.") or f".{name}." in parameter for name in projections)


def _summary(grad: Tensor | None) -> dict[str, float] | None:
    if grad is None:
        return None
    magnitude = grad.detach().abs().float()
    return {
        "norm": float(magnitude.norm()),
        "mean": float(magnitude.mean()),
        "max": float(magnitude.max()),
        "nonzero": float((magnitude > 0).float().mean()),
    }


def _print(result: dict[str, Any]) -> None:
    rows = [
        [name, *(["no gradient"] if one is None else [f"{value:.3g}" for value in one.values()])]
        for name, one in result["parameters"].items()
    ]
    print(tabulate(rows, headers=["parameter", "norm", "mean", "max", "nonzero share"], disable_numparse=True))
    for name, site in result["sites"].items():
        print(f"{name}: {'obeys' if site['passed'] else 'BREAKS'} its identity, off by {site['deviation']}")
