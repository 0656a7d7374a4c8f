"""Noise: standard normal, and a function of seed, layer, activation, column, head and feature alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.claims import Claim, Margin, check
from pytest_circuitfreeze.suites.judge.noise_draws import Draws, engine_noise, read_noise
from pytest_circuitfreeze.suites.judge.oracle import frozen_roles
from pytest_circuitfreeze.suites.judge.site_lookup import sites
from pytest_circuitfreeze.suites.tolerance import gamma
from pytest_circuitfreeze.wrapped import dtype_of

if TYPE_CHECKING:
    from freeze_core import InterventionConfig
    from pytest_circuitfreeze.engines import Engine

__all__ = ["check_noise_depends_on_its_place_alone", "check_noise_is_standard_normal"]

DOUBT = 1e-9
"""How often one comparison, or all those of pairs together, may refuse draws that are as they should be."""


@check
def check_noise_is_standard_normal(engine: Engine, model: PreTrainedModel, seed: int, columns: int = 64) -> Margin:
    """Draws are standard normal, and uncorrelated across seed, layer, activation, column and head.

    The distribution is compared with the normal one by the Dvoretzky-Kiefer-Wolfowitz inequality, and, since that is
    blind to a few per cent of the size, the mean square with 1 by Laurent's and Massart's. Two lists of draws are
    compared by their product, which given the one is normal with that one's length as standard deviation. No column and
    no head, of any seed, layer and activation, may have the direction of another one, far apart as they may be.

    Raises:
        ClaimBroken: each of these less likely than `DOUBT` if the draws were as claimed.
    """
    claim = Claim("noise is standard normal and independent")
    draws = engine_noise(engine, model, seed, columns)
    others = engine_noise(engine, model, seed + 1, columns)
    values = torch.cat([draw.flatten() for draw in draws.values()]).sort().values
    normal = torch.special.ndtr(values)
    steps = torch.arange(1, len(values) + 1, dtype=torch.float64, device=values.device) / len(values)
    distance = float(torch.maximum((steps - normal).abs(), (normal - steps + 1 / len(values)).abs()).max())
    bound = math.sqrt(math.log(2 / DOUBT) / (2 * len(values)))
    claim.at_most("distance of the distribution from the normal one", distance, bound)
    share = math.log(2 / DOUBT) / len(values)
    excess = abs(float(values.square().mean()) - 1)
    claim.at_most("distance of the mean square from 1", excess, 2 * math.sqrt(share) + 2 * share)
    for (_, layer, role), draw in draws.items():
        for what, one, other in (
            (f"under seeds {seed} and {seed + 1}", draw, others[seed + 1, layer, role]),
            ("at neighbouring positions", draw[1:], draw[:-1]),
            ("at neighbouring heads", draw[:, 1:], draw[:, :-1]),
            ("at neighbouring features", draw[..., 1:], draw[..., :-1]),
        ):
            _demand_unrelated(claim, f"for {role} {what}", one, other, layer=layer)
    for (first, one), (second, other) in combinations(draws.items(), 2):
        heads, features = (min(one.shape[axis], other.shape[axis]) for axis in (1, 2))
        what = f"for {first[2]} of layer {first[1]} and {second[2]} of layer {second[1]}"
        _demand_unrelated(claim, what, one[:, :heads, :features], other[:, :heads, :features])
    _demand_no_copies(claim, draws | others, gamma(8, dtype_of(model)))
    return claim.margin


def _demand_unrelated(claim: Claim, what: str, one: Tensor, other: Tensor, **where: int) -> None:
    if one.numel() == 0:  # one head has no neighbour
        return
    likeness = float((one * other).sum().abs() / other.square().sum().sqrt())
    # Phi(-6.2) is 3e-10, so both tails together are below DOUBT.
    bound = float(-torch.special.ndtri(torch.tensor(DOUBT / 2, dtype=torch.float64)))
    claim.at_most(f"likeness of draws {what}, in standard deviations of chance", likeness, bound, **where)


def _demand_no_copies(claim: Claim, draws: Draws, rounding: float) -> None:
    """Demands that no two columns, and no two heads, have draws of one direction, either way.

    The angle between two independent normal vectors of `n` numbers has a sine of at most `s` with a probability of at
    most `s ** (n - 1)`: the share of a sphere that two opposite caps cover. The doubt is spread over all pairs.

    Args:
        rounding: how much of its length a vector may be off, by which its angle to another one is, too.
    """
    groups = list(_comparable(draws))
    pairs = sum(math.comb(len(vectors), 2) for _, vectors in groups)
    for names, vectors in groups:
        numbers = vectors.shape[1]
        sine = (DOUBT / pairs) ** (1 / (numbers - 1)) - 2 * rounding if numbers > 1 else 0.0
        if sine <= 0:  # a copy cannot be told from chance
            continue
        for start in range(0, len(vectors), 256):  # all at once is too much memory
            alike = (vectors[start : start + 256] @ vectors[start:].T).abs().triu(1)
            one, other = (start + int(at) for at in torch.unravel_index(alike.argmax(), alike.shape))
            # Measured by its cotangent, of which chance makes a small part of the bound in few dimensions and in many.
            cosine = float(alike.max())
            cotangent = cosine / math.sqrt(max(1 - cosine**2, torch.finfo(alike.dtype).eps))
            what = f"cotangent of the angle between the draws of {names[one]} and of {names[other]}"
            claim.at_most(what, cotangent, math.sqrt(1 - sine**2) / sine)


def _comparable(draws: Draws) -> Iterator[tuple[list[str], Tensor]]:
    """Names and directions `[vector, number]` of all columns, and of all heads.

    Of each shape there are those of this shape, and the beginnings of those that are larger.
    """
    for what, axis in (("column", 0), ("head", 1)):
        lists = {place: draw.transpose(0, axis) for place, draw in draws.items()}
        for rows, features in sorted({tuple(each.shape[1:]) for each in lists.values()}):
            names, vectors = [], []
            for (seed, layer, role), each in lists.items():
                if each.shape[1] >= rows and each.shape[2] >= features:
                    names += [f"{what} {at} of {role} of layer {layer} under seed {seed}" for at in range(len(each))]
                    vectors.append(each[:, :rows, :features].flatten(1))
            yield names, torch.nn.functional.normalize(torch.cat(vectors))


@check
def check_noise_depends_on_its_place_alone(
    engine: Engine, model: PreTrainedModel, config: InterventionConfig, batch: Batch
) -> Margin:
    """Draws are the same in any batch, on every row and pass, and whatever else is frozen.

    Args:
        config: freezes to noise; its seed, layers and circuit are used, on all heads.
        batch: what the draws are compared on, with one row that is longer and has no padding.

    Raises:
        ClaimBroken: they differ by more than turning rotary positions back explains.
    """
    from freeze_core import InterventionConfig

    claim = Claim("noise depends on its place alone")
    known = sites(model)
    alone = InterventionConfig(
        layer_indices=config.layer_indices, circuit=config.circuit, freeze_type="noise", noise_std=1.0, seed=config.seed
    )
    columns = batch.input_ids.shape[1]
    want = engine_noise(engine, model, config.seed, columns + 3)
    for row in range(len(batch.input_ids)):
        got = read_noise(engine, model, alone, batch, row)
        for layer in alone.layer_indices or known:
            for part in (part for role in frozen_roles(alone) for part in known[layer].parts_of(role)):
                key = (config.seed, layer, part)
                bound = gamma(8, dtype_of(model)) * float(want[key].abs().max())
                due = want[key][:columns]
                claim.within(f"draws of {part}", got[key], due, bound, "position head feature", layer=layer, row=row)
    return claim.margin
