"""Equivalence: the same weights stored fused or separate give the same outputs and gradients under the same freeze."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pytest_circuitfreeze.recordings import moved_to
from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.claims import Claim, Margin, check
from pytest_circuitfreeze.suites.gradients import weighted_sum, without_gradients
from pytest_circuitfreeze.suites.judge.equivalent_models import EquivalentModel
from pytest_circuitfreeze.suites.judge.judged_sites import Site
from pytest_circuitfreeze.suites.judge.observed_passes import attention_implementation, of_real_tokens
from pytest_circuitfreeze.suites.judge.rounding import NudgedAttention, largest_change
from pytest_circuitfreeze.suites.judge.site_lookup import implementations, sites
from pytest_circuitfreeze.suites.tolerance import nudged

if TYPE_CHECKING:
    from freeze_core import InterventionConfig
    from pytest_circuitfreeze.engines import Engine

__all__ = ["check_storage_does_not_matter"]


@check
def check_storage_does_not_matter(
    engine: Engine, model: PreTrainedModel, twin: EquivalentModel, config: InterventionConfig, batch: Batch
) -> Margin:
    """`model` and its twin give the same logits and gradients under the same freeze, within rounding.

    Gradients of the embeddings and of every q, k and v weight and bias, compared head by head.

    Raises:
        ClaimBroken: they do not.
    """
    claim = Claim("storage does not matter")
    got = _results(engine, model, config, batch, claim)
    want = _results(engine, twin.model, moved_to(config, twin.model), batch, claim)
    near = nudged(twin.model)
    with engine.freeze(near, moved_to(config, near)):
        pass  # whoever finds heads by differentiation has found them before the gradients of attention are nudged
    with NudgedAttention():
        moved = _results(engine, near, moved_to(config, near), batch, claim)
    if not all(parameter.requires_grad for parameter in model.parameters()):
        want = {key: value for key, value in want.items() if key in got}  # a twin learns all
    for key in sorted({*got} ^ {*want}, key=str):
        claim.broken(f"only one of the two has a {key.what}", **key.where)
    for key, value in got.items():
        bound = largest_change(want[key], moved[key])
        claim.within(key.what, value, want[key], bound, key.axes, **key.where)
    return claim.margin


class _Key(NamedTuple):
    """What was found, the names of its axes, and in which layer."""

    what: str
    axes: str
    layer: int | None = None

    @property
    def where(self) -> dict[str, int]:
        return {} if self.layer is None else {"layer": self.layer}


def _results(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch, claim: Claim
) -> dict[_Key, Tensor]:
    """Logits of real tokens and gradients, by names that do not depend on the storage."""
    known = sites(model)
    with without_gradients(model), attention_implementation(model, implementations(model)[0]), torch.enable_grad():
        with engine.freeze(model, config) as frozen:
            logits = frozen(**batch.arguments(model)).logits
            if logits.requires_grad:
                weighted_sum(logits, batch).backward()
        found = {_Key("logits", "row position word"): of_real_tokens(logits.detach(), batch)}
        embeddings = model.get_input_embeddings().weight.grad
        if embeddings is not None:
            found[_Key("gradient of the embeddings", "word feature")] = embeddings
        for layer, site in known.items():
            made = {f"{path}.weight": site.module.get_parameter(f"{path}.weight") for path in site.sources}
            lost = [name for name, one in made.items() if one.requires_grad and one.grad is None]
            claim.demand(not lost, f"no gradient of {', '.join(lost)} in {type(model).__name__}", layer=layer)
            for name, gradient in _projection_gradients(site).items():
                found[_Key(f"gradient of {name}'s weight and bias", "head feature input", layer)] = gradient
    return found


def _projection_gradients(site: Site) -> dict[str, Tensor]:
    """Gradients of each part's weight `[head, feature, model_dim]`, with the bias's, if any, as one more input of 1.

    Kept together because the bias's alone may be a sum that cancels: its rounding is that of what was summed.
    """
    weights, biases = site.weights(_grad), site.biases(_grad)
    return {
        name: torch.cat([weight, biases[name][..., None]], -1) if name in biases else weight
        for name, weight in weights.items()
        if _learns(site.sources[site.parts[name].path])
    }


def _learns(source: nn.Module) -> bool:
    """Whether all parameters of a projection have gradients: some may be frozen by `requires_grad`."""
    return all(parameter.grad is not None for parameter in source.parameters())


def _grad(parameter: Tensor) -> Tensor | None:
    return parameter.grad
