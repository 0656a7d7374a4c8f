"""What a frozen attention layer should have computed, worked out anew in float64.

Shares no code with any engine: it starts from the layer's input as it was recorded, multiplies by the clean weights,
freezes as the contract says, and attends. Every head gets its own view of K and V, so both scopes are the same
arithmetic here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pytest_circuitfreeze.suites.judge.attention_formula import Formula
from pytest_circuitfreeze.suites.judge.expected_replacements import Material
from pytest_circuitfreeze.suites.judge.judged_sites import ROLES, CannotJudge, Role, Site
from pytest_circuitfreeze.suites.judge.recorder import Seen
from pytest_circuitfreeze.suites.tolerance import Exact, Nudge

if TYPE_CHECKING:
    from freeze_core import InterventionConfig

__all__ = [
    "Answer",
    "Gradients",
    "blend",
    "chosen_heads",
    "due",
    "frozen_roles",
    "judged_layers",
    "pulled_back",
    "untouched",
]


@dataclass
class Answer:
    """What is due, in float64, each query head with a K and V of its own.

    Args:
        used: q, k and v as attention reads them `[batch, head, token, head_dim]`.
        pattern: `[batch, head, query, key]`.
        z: `[batch, token, head, head_dim]`.
    """

    used: dict[Role, Tensor]
    pattern: Tensor
    z: Tensor


@dataclass
class Gradients:
    """Gradients that are due, in float64.

    Args:
        hidden: of the attention module's input `[batch, token, model_dim]`.
        weights: of each role's weight `[head, feature, model_dim]`.
        biases: of each role's bias `[head, feature]`.
    """

    hidden: Tensor
    weights: dict[str, Tensor]
    biases: dict[str, Tensor]


def due(
    site: Site,
    seen: Seen,
    real: Tensor,
    configs: Sequence[InterventionConfig],
    material: Material | None = None,
    nudge: Nudge | None = None,
    softmax: torch.dtype = torch.float64,
) -> Answer:
    """What layer `site` should have computed from `seen.hidden` under `configs`.

    Args:
        real: `[batch, token]` bool, true where a token is not padding.
        configs: in install order, the later one winning where they meet.
        material: what replacements are made of, where they are more than zero or statistics of the pass.
        nudge: imitates rounding, for a bound; `None` is exact.
        softmax: dtype in which the model takes the softmax, when that is narrower than its own.
    """
    touch, formula = nudge or _exact, _formula(site)
    used = frozen_used(site, seen, real, configs, material, touch)
    q, k, v = (touch(used[role], 4) for role in ROLES)
    scores = touch(formula.score(touch(q, formula.head_dim), k), 4, softmax)
    visible = formula.visible(real)
    # A padded query sees nothing; its pattern is no one's concern and must only not be nan.
    scores = scores.masked_fill(~visible, -torch.inf).masked_fill(~visible.any(-1, keepdim=True), 0.0)
    pattern = touch(scores.softmax(-1), real.shape[1], softmax)
    return Answer(used, pattern, (pattern @ v).transpose(1, 2))


def frozen_used(
    site: Site,
    seen: Seen,
    real: Tensor,
    configs: Sequence[InterventionConfig],
    material: Material | None,
    touch: Nudge | Exact,
    weights: Mapping[str, Tensor] | None = None,
    biases: Mapping[str, Tensor] | None = None,
    hidden: Tensor | None = None,
) -> dict[Role, Tensor]:
    """q, k and v as attention should have read them, `[batch, head, token, head_dim]` float64, differentiable.

    `weights`, `biases` and `hidden` default to the layer's own; given as leaves, gradients flow back to them by the
    estimators' definition.
    """
    weights = site.weights() if weights is None else weights
    biases = site.biases() if biases is None else biases
    hidden = seen.hidden.detach() if hidden is None else hidden
    rotary = None if seen.rotary is None else (seen.rotary[0].double(), seen.rotary[1].double())
    used = {}
    for role in ROLES:
        weight = touch(weights[role].double(), hidden.shape[-1])
        x = torch.einsum("btm,hdm->bthd", hidden.double(), weight)
        if role in biases:
            x = x + touch(biases[role].double())
        x = _frozen(site, role, x, real, configs, material, touch)
        used[role] = _formula(site).used(role, x, rotary)
    return used


def pulled_back(
    site: Site,
    seen: Seen,
    real: Tensor,
    configs: Sequence[InterventionConfig],
    material: Material | None = None,
    nudge: Nudge | None = None,
) -> Gradients:
    """Gradients that are due, given those that reached q, k and v as used (`seen.probes`)."""
    hidden = seen.hidden.detach().double().requires_grad_()
    weights = {role: weight.double().requires_grad_() for role, weight in site.weights().items()}
    biases = {role: bias.double().requires_grad_() for role, bias in site.biases().items()}
    touch = nudge or _exact
    with torch.enable_grad():
        used = frozen_used(site, seen, real, configs, material, touch, weights, biases, hidden)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for role in ROLES:
            arrived = seen.probes[role].grad
            if arrived is not None:
                # Where KV heads are shared, the one that was used has the gradient of all its readers.
                step = site.heads // arrived.shape[1]
                terms = real.numel() + site.heads * _formula(site).head_dim
                total = total + (touch(arrived.double(), terms) * used[role][:, ::step]).sum()
    leaves = [hidden, *weights.values(), *biases.values()]
    grads = torch.autograd.grad(total, leaves, materialize_grads=True)
    count = 1 + len(weights)
    of_weights = dict(zip(weights, grads[1:count], strict=True))
    return Gradients(grads[0], of_weights, dict(zip(biases, grads[count:], strict=True)))


def frozen_roles(config: InterventionConfig) -> tuple[Role, ...]:
    """The activations that a config's circuit names."""
    circuits: dict[str, tuple[Role, ...]] = {"qk": ("q", "k"), "ov": ("v",), "both": ROLES}
    return circuits.get(str(config.circuit), (str(config.circuit),))  # type: ignore[arg-type]  # q, k or v


def chosen_heads(site: Site, config: InterventionConfig, role: Role) -> list[int]:
    """Query heads whose own view of `role` the config freezes in this layer, in order; none where it names others."""
    if role not in frozen_roles(config) or not _names(config.layer_indices, site.layer, site.layers):
        return []
    heads = [head for head in range(site.heads) if _names(config.head_indices, head, site.heads)]
    if role == "q" or str(config.kv_scope) == "head":
        return heads
    touched = {head // site.group for head in heads}
    return [head for head in range(site.heads) if head // site.group in touched]


def judged_layers(known: Mapping[int, Site], configs: Sequence[InterventionConfig]) -> list[int]:
    """The layers that any of `configs` freezes, and the one after each, where a slip by one would show."""
    frozen = {
        layer
        for layer, site in known.items()
        for config in configs
        for role in ROLES
        if chosen_heads(site, config, role)
    }
    return sorted(frozen | {layer + 1 for layer in frozen if layer + 1 in known})


def _names(indices: Sequence[int] | None, index: int, count: int) -> bool:
    return indices is None or index in indices or index - count in indices


_exact = Exact()


def _formula(site: Site) -> Formula:
    if site.formula is None:
        raise CannotJudge(f"how layer {site.layer} attends is not known by heart")
    return site.formula


def _frozen(
    site: Site,
    role: Role,
    x: Tensor,
    real: Tensor,
    configs: Sequence[InterventionConfig],
    material: Material | None,
    touch: Nudge | Exact,
) -> Tensor:
    """The activation after all freezes, `[batch, token, query head, head_dim]`."""
    own = torch.arange(site.heads, device=x.device) // (1 if role == "q" else site.group)
    result = x[:, :, own]
    for config in configs:
        heads = chosen_heads(site, config, role)
        if not heads:
            continue
        r = (material or Material()).replacement(site.layer, role, range(x.shape[2]), x, real, config, touch)
        r = r.expand(x.shape)[:, :, own[heads]]
        result = result.index_copy(
            2, torch.tensor(heads, device=x.device), blend(x[:, :, own[heads]], r, config, touch)
        )
    return result


def blend(x: Tensor, r: Tensor, config: InterventionConfig, touch: Nudge | Exact) -> Tensor:
    """`x + strength * (r - x)`, with the gradient that the config's estimator has: 0 at strength 1, even of nan."""
    strength = config.strength
    value = x + strength * touch(r - x, 2) if strength < 1 else torch.where(x.new_tensor(True, dtype=torch.bool), r, x)
    return value.detach() + (x - x.detach()) if str(config.backward_mode) == "ste" else value


def untouched(configs: Sequence[InterventionConfig]) -> list[InterventionConfig]:
    """`configs` for the attention whose gradient is due: what `circuit_ste` freezes is there as if it had not been."""
    return [
        replace(config, freeze_type="zero", reference=None, strength=0.0)
        if str(config.backward_mode) == "circuit_ste"
        else config
        for config in configs
    ]
