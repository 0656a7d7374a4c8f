"""A vector that is found by gradients: the one of bounded length that moves a metric most.

Such vectors are those of N. Subramani, N. Suresh and M. E. Peters, "Extracting Latent Steering Vectors from Pretrained
Language Models", 2022. Steps are along the gradient, of a length that shrinks from step to step, and after each the
vector is put back to the ball of the bound. (An optimiser that scales each feature by itself, as Adam does, would not
do: put back to the ball time and again, it ends where all features are as large as each other, whatever the gradient.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from freeze_core.errors import InterventionError
from freeze_core.generators import Generators
from freeze_core.runs.measuring import logits_at
from freeze_core.scoring.batches import Batch
from freeze_core.scoring.metrics import Metric
from freeze_core.vectors.positions import Positions
from freeze_core.vectors.sites import ResidualSite
from freeze_core.vectors.steered import Addition, steer

__all__ = ["optimised"]

START, WAY = 0.1, 2.5
"""How far the start is from 0, and how long all steps are together, in units of the bound: they are to reach it."""


def optimised(
    model: nn.Module,
    site: ResidualSite,
    batches: Sequence[Batch],
    measure: Metric,
    positions: Positions,
    *,
    hidden: int,
    bound: float,
    steps: int,
    seed: int,
    start: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The best vector `[hidden]` that was seen, and what was lowered at each `[step + 1]`: the mean loss over prompts.

    `loss` is lowered itself, any other metric's negative. No parameter, gradient, flag or generator of the model is
    touched; every step draws the same dropout.

    Args:
        seed, start: of where it starts, in no direction that another start or a random vector of that seed has.

    Raises:
        InterventionError: the metric has no gradient, one that is 0, or one that is not finite.
    """
    drawn = torch.randn(hidden, generator=_generator(seed, start), dtype=torch.float64)
    device = next((one.device for one in site.module.parameters() if not one.is_meta), torch.device("cpu"))
    vector = (drawn * (START * bound / drawn.norm())).to(device, dtype).requires_grad_()
    best, losses = vector.detach().clone(), list[float]()
    generators = Generators(model)
    before, clean = generators.states(), [torch.empty(0)] * len(batches)
    with generators.restored():
        if measure.name == "kl":
            with torch.no_grad():
                clean = [logits_at(model, batch) for batch in batches]
        for step in range(steps + 1):
            with torch.enable_grad(), steer(site, Addition(vector, positions, "optimised"), "ignore"):
                generators.put(before)
                loss, gradient = _with_gradient(model, batches, measure, vector, clean, differentiate=step < steps)
            if not losses or loss < min(losses):
                best = vector.detach().clone()
            losses.append(loss)
            if step == 0 and not bool(gradient.any()):
                raise InterventionError(
                    f"metric={measure.name} does not depend on the vector at all: its gradient is 0; are the logits "
                    "that it is of before the positions to which the vector is added?"
                )
            if step < steps:
                with torch.no_grad():
                    length = WAY * bound * 2 * (1 - step / steps) / (steps + 1)  # these add up to the way
                    vector -= gradient * (length / gradient.norm().clamp(min=torch.finfo(dtype).tiny))
                    vector *= min(1.0, bound / float(vector.norm()))
    return best.cpu(), torch.tensor(losses, dtype=torch.float64)


def _generator(seed: int, start: int) -> torch.Generator:
    """By a hash: `seed` itself draws the random vectors that what is found is compared with."""
    digest = hashlib.sha256(f"start {start} of {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _with_gradient(
    model: nn.Module,
    batches: Sequence[Batch],
    measure: Metric,
    vector: Tensor,
    clean: Sequence[Tensor],
    differentiate: bool,
) -> tuple[float, Tensor]:
    """The mean loss over all prompts, and its gradient; batch by batch, so that one graph is held at a time."""
    rows = sum(batch.rows for batch in batches)
    sign = 1 if measure.name == "loss" else -1
    total, gradient = 0.0, torch.zeros_like(vector)
    for number, batch in enumerate(batches):
        values = measure.values(number, batch, logits_at(model, batch), clean[number], "while it is optimised")
        loss = sign * values.sum() / rows
        total += float(loss.detach())
        if not differentiate:
            continue
        if not loss.requires_grad:
            raise InterventionError(
                f"metric={measure.name} has no gradient with respect to the vector: method='optimised' "
                "needs one that can be differentiated"
            )
        try:
            (own,) = torch.autograd.grad(loss, [vector])
        except RuntimeError as error:
            raise InterventionError(f"metric={measure.name} cannot be differentiated in this model: {error}") from error
        gradient += own
    if not bool(gradient.isfinite().all()):
        raise InterventionError(
            f"the gradient of metric={measure.name} is not finite: give another metric or other prompts, or run in a "
            "wider dtype"
        )
    return total, gradient
