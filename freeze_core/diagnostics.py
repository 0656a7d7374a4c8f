"""Instruments that look at a freeze at work: what it does to gradients, how far it moves the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from freeze_core.attention.layout import AttentionSite, Sites
from freeze_core.attention.shards import gathered_from
from freeze_core.attention.sites import find_sites
from freeze_core.config import InterventionConfig, check_config
from freeze_core.errors import InterventionError
from freeze_core.freezing.frozen_modules import FrozenProjection, frozen_attention
from freeze_core.freezing.install import install, is_frozen
from freeze_core.freezing.plan import LayerFreeze, assign
from freeze_core.freezing.requests import resolve
from freeze_core.generators import Generators
from freeze_core.inputs import logits_of, model_arguments, run
from freeze_core.vocabulary import BackwardMode

__all__ = ["gradient_behavior", "gradient_table", "intervention_effect"]

KEYS = ("norm", "mean", "max", "nonzero")


def gradient_behavior(
    model: nn.Module, test_input: Tensor, config: InterventionConfig, print_table: bool = False
) -> dict[str, Any]:
    """See `AttentionCircuitFreezer.check_gradient_behavior`."""
    check_config(config)
    config = config.checked()
    sites = find_sites(model, attention=config.attention)
    arguments = model_arguments(model, test_input)
    with _frozen(sites, config), ExitStack() as stack, torch.enable_grad():
        taps = [stack.enter_context(_tapped(site, one)) for site, one in _projections(sites)]
        # Before the pass: FSDP leaves others in their place until the backward pass is over.
        parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
        loss = logits_of(run(model, arguments)).float().square().mean()
        if not loss.requires_grad:
            raise InterventionError("no parameter of the model and not the input requires a gradient: nothing to check")
        grads = _gradients(loss, parameters, arguments.values(), taps)
    of_parameters = {name: grads[one] for name, one in parameters.items()}
    checked = {tap.name: _verdict(tap, grads) for tap in taps}
    lost = [name for name, one in of_parameters.items() if one is None and _belongs(name, list(checked))]
    result = {
        "validation_passed": all(site["passed"] for site in checked.values())
        and not (lost and config.preserve_gradients),
        "loss_value": float(loss.detach()),
        "parameters": {name: _summary(grad) for name, grad in of_parameters.items()},
        "sites": checked,
        "notes": [note for site in checked.values() for note in site.pop("notes")],
    }
    if print_table:
        print(gradient_table(result))
    return result


def _gradients(
    loss: Tensor, parameters: Mapping[str, Tensor], inputs: Iterable[Any], taps: Sequence[_Tap]
) -> dict[Tensor, Tensor | None]:
    """The gradients of parameters and of tapped activations, without a trace in any `.grad`."""
    if not any(tap.reentrant for tap in taps) and not any(hasattr(one, "device_mesh") for one in parameters.values()):
        sources = [*parameters.values(), *_activations(taps)]
        return dict(zip(sources, torch.autograd.grad(loss, sources, allow_unused=True), strict=True))
    # Reentrant checkpoints have gradients in `backward()` alone, and so have the parameters that FSDP puts together.
    stepping = next((name for name, one in parameters.items() if one._post_accumulate_grad_hooks), None)
    if stepping is not None:
        raise InterventionError(
            f"{stepping} has a hook that runs once its gradient is there (an optimizer's step, say), and the gradients "
            "of this model can be had by loss.backward() alone, which would run it: remove the hook first"
        )
    given = [one for one in inputs if isinstance(one, Tensor) and one.is_leaf and one.requires_grad]
    leaves = [*parameters.values(), *given]
    before = [leaf.grad for leaf in leaves]
    try:
        for leaf in leaves:
            leaf.grad = None
        loss.backward()
        return {one: _whole(one.grad) for one in (*leaves, *_activations(taps))}
    finally:
        for leaf, grad in zip(leaves, before, strict=True):
            leaf.grad = grad


def _activations(taps: Sequence[_Tap]) -> list[Tensor]:
    return [x for tap in taps for x in (tap.before, tap.after) if x is not None]


def _whole(grad: Tensor | None) -> Tensor | None:
    """A gradient that is spread over processes, put together."""
    full = getattr(grad, "full_tensor", None)
    return full() if full else grad


def _gathered(
    grads: Mapping[Tensor, Tensor | None], activation: Tensor | None, projection: FrozenProjection, width: int
) -> Tensor | None:
    """The gradient of what a projection gives, with the features of all processes."""
    grad = None if activation is None else grads.get(activation)
    if grad is None:
        return None
    return gathered_from(projection.module, 0, grad, width, f"the gradient of {projection.name}")


def intervention_effect(
    model_baseline: nn.Module, model_intervened: nn.Module, test_input: Tensor, config: InterventionConfig
) -> dict[str, Any]:
    """See `AttentionCircuitFreezer.verify_intervention_effect`."""
    check_config(config)
    config = config.checked()
    baseline_sites = find_sites(model_baseline, attention=config.attention)
    if is_frozen(model_baseline):
        raise InterventionError("model_baseline is frozen: remove its freeze, or pass an unfrozen copy of the model")
    sites = find_sites(model_intervened, attention=config.attention)
    if model_baseline.training != model_intervened.training:
        raise InterventionError(
            f"model_baseline.training={model_baseline.training} and model_intervened.training="
            f"{model_intervened.training}: dropout would differ, too; put both in the same mode, by eval() say"
        )
    # Both passes draw the same dropout, so that what differs is what the freeze changes.
    generators = Generators(nn.ModuleList([model_baseline, model_intervened]))
    start = generators.states()
    try:
        with torch.no_grad():
            clean, before = _outcome(model_baseline, baseline_sites, test_input)
            generators.put(start)
            with _frozen(sites, config):
                chosen = {layer: _reading_frozen(site) for layer, site in sites.by_layer.items()}
                frozen, after = _outcome(model_intervened, sites, test_input)
    finally:
        generators.put(start)
    if frozen.shape != clean.shape or any(
        before[layer].shape != z.shape for layer, z in after.items() if layer in before
    ):
        raise InterventionError(
            "model_baseline is another model than model_intervened: their logits or heads differ in shape"
        )
    difference = (frozen.double() - clean.double()).abs()
    heads = [
        {"layer": layer, "head": head, "frozen": head in chosen[layer], **_sizes(after[layer][:, :, head] - own)}
        for layer, z in before.items()
        if layer in after
        for head, own in enumerate(z.unbind(2))
    ]
    return {
        "max_absolute_diff": float(difference.max()),
        "mean_absolute_diff": float(difference.mean()),
        "changed": not torch.equal(frozen, clean),
        "heads": heads,
    }


def _outcome(model: nn.Module, sites: Sites, test_input: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    """The logits, and by layer the z `[batch, token, head, head_dim]` that its heads mixed, before a freeze of z."""
    zs: dict[int, Tensor] = {}

    def keeper(site: AttentionSite) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            z = gathered_from(module, 1, args[0], site.layout.z.numel(), f"z of {site.name}")
            if z.shape[-1] == site.layout.z.numel():
                zs[site.layer] = z.unflatten(-1, (site.heads, -1)).clone()

        return keep

    with ExitStack() as stack:
        for site in sites.by_layer.values():
            stack.callback(site.layout.output.register_forward_pre_hook(keeper(site)).remove)
        return logits_of(run(model, model_arguments(model, test_input))), zs


def _reading_frozen(site: AttentionSite) -> set[int]:
    """The query heads of which some activation is frozen, along with a neighbour's or for themselves."""
    frozen = frozen_attention(site.attention)
    assignment = assign(site, [freeze for _, freeze in frozen.plan.freezes]) if frozen else {}
    return {head for treatments in assignment.values() for head, one in enumerate(treatments) if one is not None}


@contextmanager
def _frozen(sites: Sites, config: InterventionConfig) -> Iterator[None]:
    """Frozen with `config`: as the model already is, or for the time being."""
    resolved = resolve(config, sites)
    if all(_in_force(freeze, sites.by_layer[freeze.layer]) for freeze in resolved):
        yield
    else:
        with install([(sites, resolved)]):
            yield


def _in_force(freeze: LayerFreeze, site: AttentionSite) -> bool:
    """Whether to install `freeze` now would change nothing; one that a later one has won over is live, not in force."""
    frozen = frozen_attention(site.attention)
    live = [one for _, one in frozen.plan.freezes] if frozen else []
    return assign(site, [*live, freeze]) == assign(site, live)


@dataclass(eq=False)
class _Tap:
    """A frozen projection, and its activation before and after the freeze with their place in the graph.

    `counted` is whether it has run already, other than to spare the circuit; `reentrant` whether it ran without
    gradients first, as in a reentrant checkpoint: what is in the graph is what runs again in the backward pass.
    """

    site: AttentionSite
    projection: FrozenProjection
    before: Tensor | None = None
    after: Tensor | None = None
    counted: bool = False
    reentrant: bool = False

    @property
    def name(self) -> str:
        return f"{self.site.name}.{self.projection.name}"

    def count(self) -> None:
        """Notes that the projection runs, unless it runs again for its gradient."""
        if torch._C._current_graph_task_id() != -1 or self.projection.sparing:
            return
        if self.counted:
            raise InterventionError(f"{self.name} runs several times in each pass: no one gradient tells of its freeze")
        self.counted = True
        self.reentrant = not torch.is_grad_enabled()


def _first(tap: Tensor | None, x: Tensor) -> Tensor | None:
    """What was tapped, or else `x` if it is in the graph: its gradient is kept."""
    if tap is None and x.requires_grad:
        x.retain_grad()
        return x
    return tap


def _projections(sites: Sites) -> Iterator[tuple[AttentionSite, FrozenProjection]]:
    for site in sites.by_layer.values():
        frozen = frozen_attention(site.attention)
        for projection in frozen.projections if frozen else ():
            yield site, projection


@contextmanager
def _tapped(site: AttentionSite, projection: FrozenProjection) -> Iterator[_Tap]:
    tap = _Tap(site, projection)
    original = projection.original

    # The first call is the one whose gradient counts: under circuit_ste the attention runs once more, cut off.
    def before(*args: Any, **kwargs: Any) -> Tensor:
        tap.count()
        x: Tensor = original(*args, **kwargs)
        tap.before = _first(tap.before, x)
        return x

    def after(module: nn.Module, args: Any, output: Tensor) -> None:
        tap.after = _first(tap.after, output)

    hook = projection.module.register_forward_hook(after)
    try:
        with projection.running(before):
            yield tap
    finally:
        hook.remove()


def _verdict(tap: _Tap, grads: Mapping[Tensor, Tensor | None]) -> dict[str, Any]:
    """Whether the gradient obeys its identity at one projection, and what it is for each head.

    The identities are `dx = (1 - a) dx'` under `stopgrad` and `dx = dx'` under `ste`, on the frozen features;
    `dx = dx'` elsewhere. Under `circuit_ste` both are of the run that spares the circuit, in which nothing stands
    between the two.
    """
    projection = tap.projection
    dx = _gathered(grads, tap.before, projection, tap.site.layout.shared.widths[projection.name])
    dx_after = _gathered(grads, tap.after, projection, projection.storage.widths[projection.name])
    rows = _rows(tap, grads)
    if dx is None or dx_after is None:
        return {"passed": dx is dx_after, "deviation": None, "bound": None, "heads": [], "rows": rows, "notes": []}
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
    return {
        "passed": deviation <= bound,
        "deviation": deviation,
        "bound": bound,
        "heads": _heads(tap, dx),
        "rows": rows,
        "notes": _notes(tap, dx_after),
    }


def _touched(tap: _Tap) -> Tensor:
    """Which features of the projection's own output are frozen for some query head, `[feature]` bool."""
    touched = torch.zeros(tap.site.layout.shared.widths[tap.projection.name], dtype=torch.bool)
    source = tap.projection.source
    for edit in tap.projection.edits:
        touched[edit.mask.nonzero().flatten() if source is None else source[edit.mask]] = True
    return touched


def _rows(tap: _Tap, grads: Mapping[Tensor, Tensor | None]) -> dict[str, dict[str, dict[str, float]]]:
    """The gradients of the projection's own parameters, rows that make frozen features apart from the others."""
    touched, found = _touched(tap), {}
    for name, parameter in tap.projection.module.named_parameters(recurse=False):
        grad = grads.get(parameter)
        # One row a feature; transformers' Conv1D keeps its weight as [in, out].
        across = -1 if hasattr(tap.projection.module, "nf") else 0
        if grad is not None and grad.shape[across] == len(touched):
            rows = grad.movedim(across, 0)
            apart = {"frozen": rows[touched.to(grad.device)], "unfrozen": rows[~touched.to(grad.device)]}
            found[name] = {which: _sizes(own) for which, own in apart.items() if own.numel()}
    return found


def _heads(tap: _Tap, dx: Tensor) -> list[dict[str, Any]]:
    """The gradient at each head's activation before the freeze, frozen and unfrozen ones apart."""
    touched = _touched(tap)
    rows = []
    for role, parts in tap.site.layout.shared.features.items():
        for part in parts:
            for head, features in enumerate(part.features if part.module == tap.projection.name else ()):
                frozen = bool(touched[features].any())
                rows.append({"role": role, "head": head, "frozen": frozen, **_sizes(dx[..., features.to(dx.device)])})
    return rows


def _notes(tap: _Tap, dx_after: Tensor) -> list[str]:
    """Names the heads under `ste` whose gradient is 0 because none arrives, so that nobody takes it for a fault."""
    notes = []
    for role, parts in tap.projection.storage.features.items():
        for part in parts:
            if part.module != tap.projection.name:
                continue
            frozen = [
                head
                for head, features in enumerate(part.features)
                for edit in tap.projection.edits
                if edit.treatment.backward_mode == BackwardMode.STE and bool(edit.mask[features].any())
            ]
            silent = [head for head in frozen if not bool(dx_after[..., part.features[head].to(dx_after.device)].any())]
            if silent:
                notes.append(
                    f"{tap.name}: no gradient arrives at {role} of heads {silent}, so ste passes none: with zero on q "
                    "and on k each gradient is a product with the other, which is 0; circuit_ste has a gradient"
                )
    return notes


def _belongs(parameter: str, projections: list[str]) -> bool:
    return any(parameter.startswith(f"{name}.") or f".{name}." in parameter for name in projections)


def _summary(grad: Tensor | None) -> dict[str, float] | None:
    return None if grad is None else _sizes(grad)


def _sizes(grad: Tensor) -> dict[str, float]:
    magnitude = grad.detach().abs().float()
    return {
        "norm": float(magnitude.norm()),
        "mean": float(magnitude.mean()),
        "max": float(magnitude.max()),
        "nonzero": float((magnitude > 0).float().mean()),
    }


def gradient_table(result: dict[str, Any]) -> str:
    """What `gradient_behavior` found, for a person to read: parameters, then each frozen projection's heads."""
    headers = ["norm", "mean", "max", "nonzero share"]
    rows = [
        [name, *(["no gradient"] if one is None else [f"{value:.3g}" for value in one.values()])]
        for name, one in result["parameters"].items()
    ]
    lines = [tabulate(rows, headers=["gradient of the parameter", *headers], disable_numparse=True)]
    for name, site in result["sites"].items():
        verdict = "obeys its identity" if site["passed"] else "BREAKS its identity"
        lines.append(f"\n{name}: {verdict}, off by {site['deviation']} where {site['bound']} is allowed")
        heads = [
            [f"{one['role']} {one['head']}", "frozen" if one["frozen"] else "", *(f"{one[key]:.3g}" for key in KEYS)]
            for one in site["heads"]
        ]
        lines.append(tabulate(heads, headers=["gradient before the freeze", "", *headers], disable_numparse=True))
        rows = [
            [parameter, which, *(f"{one[key]:.3g}" for key in KEYS)]
            for parameter, apart in site["rows"].items()
            for which, one in apart.items()
        ]
        lines.append(tabulate(rows, headers=["rows of its parameters", "", *headers], disable_numparse=True))
    verdict = "PASSED" if result["validation_passed"] else "FAILED"
    return "\n".join([*lines, *result["notes"], f"validation {verdict}, loss {result['loss_value']:.6g}"])
