"""One treatment of one tensor of activations: which features, which replacement, which gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from freeze_core.attention.layout import Storage
from freeze_core.attention.sites import AttentionSite
from freeze_core.errors import InterventionError
from freeze_core.freezing.backward import blend
from freeze_core.freezing.passes import Pass
from freeze_core.freezing.plan import Assignment, Reference, Treatment
from freeze_core.freezing.traced import demand
from freeze_core.freezing.values import NoiseTable, accumulation_dtype, derangement, statistics
from freeze_core.ordinary import ordinary_tensors
from freeze_core.vocabulary import ROLES, BackwardMode, FreezeType, Role

__all__ = ["Edit", "edits_of", "edits_of_z"]


with ordinary_tensors():
    ZERO = torch.zeros(())
    """The replacement of `zero`: a number, and so of any dtype and device."""


class Place(NamedTuple):
    """Where some of a role's features, from `start` on, are in a module's output: an index `[heads, features]`."""

    role: Role
    start: int
    features: Tensor


class Edit:
    """One treatment of the features in `mask` (`[feature]` bool) of one module's activations."""

    def __init__(self, treatment: Treatment, mask: Tensor, places: Sequence[Place], noise: Mapping[Role, NoiseTable]):
        self.treatment = treatment
        self.mask = mask
        self.spares_the_circuit = treatment.backward_mode == BackwardMode.CIRCUIT_STE
        """Whether gradients are to flow as if this edit had not been made."""
        self._zeroes = treatment.freeze_type == FreezeType.ZERO
        self._places = places
        self._noise = noise

    def apply(self, x: Tensor, frozen: Tensor, running: Pass | None) -> Tensor:
        """`frozen` with this edit made; `x` is the activation before any, both `[batch, token, feature]`."""
        mask = self.mask if self.mask.device == x.device else self.mask.to(x.device)
        r = ZERO if self._zeroes else self._replacement(x.detach(), running)
        return blend(x, frozen, mask, r, self.treatment.strength, self.treatment.backward_mode)

    def _replacement(self, x: Tensor, running: Pass | None) -> Tensor:
        """`r`, broadcastable to `x` `[batch, token, feature]`; what it holds outside of `mask` is not read."""
        treatment = self.treatment
        if running is None:
            raise InterventionError(
                f"freeze_type '{treatment.freeze_type}' needs to know the running pass, but the layer was run by "
                "itself: run the model, or the module that holds its layers"
            )
        if treatment.reference is not None:
            return self._recorded(treatment.reference, x, running)
        if treatment.freeze_type == FreezeType.RESAMPLE:
            return running.without_padding(x)[derangement(treatment.seed, len(x))]
        if treatment.noise_std is not None:
            return treatment.noise_std * self._normals(x, running)
        mean, deviation = self._statistics(x, running)
        if treatment.freeze_type == FreezeType.MEAN:
            return mean
        return mean + deviation * self._normals(x, running)

    def _statistics(self, x: Tensor, running: Pass) -> tuple[Tensor, Tensor]:
        calibrated = self.treatment.statistics
        if calibrated is not None:
            mean, std = (
                {role: running.of_this_run(values[role], 2, "the statistics are of") for role in values}
                for values in (calibrated.mean, calibrated.std)
            )
            return self._laid_out(mean, x), self._laid_out(std, x)
        x = demand(
            x,
            running.cached == 0,
            f"freeze_type '{self.treatment.freeze_type}' takes its statistics from the pass, and this pass goes on "
            f"after {running.cached} cached tokens that it does not see: run without a cache (use_cache=False), "
            "freeze with calibrated statistics=, or with zero or noise_std",
        )
        return statistics(*running.real(x))

    def _normals(self, x: Tensor, running: Pass) -> Tensor:
        tokens = x.shape[1]
        start = running.column(tokens)
        return self._laid_out({role: table.columns(start, tokens, x) for role, table in self._noise.items()}, x)

    def _recorded(self, reference: Reference, x: Tensor, running: Pass) -> Tensor:
        roles = {place.role for place in self._places} & reference.activations.keys()
        recorded = {
            role: running.of_this_run(reference.activations[role], 4, "the reference was recorded of") for role in roles
        }
        for role, value in recorded.items():
            if running.cached or value.shape[1] != x.shape[1] or value.shape[0] not in (1, x.shape[0]):
                return demand(
                    x,
                    False,
                    f"the reference's {role} is {list(value.shape)} [batch, token, head, head_dim], this pass has "
                    f"{list(x.shape[:2])} [batch, token] after {running.cached} cached tokens: a reference serves a "
                    "whole pass of its own length, and of its own batch or any if it has one row",
                )
        mask = next(reference.masks[role] for role in roles)  # a module's roles are of the same tokens
        return running.padded_alike(self._laid_out(recorded, x), mask)

    def _laid_out(self, values: Mapping[Role, Tensor], x: Tensor) -> Tensor:
        """Values by role `[..., heads, head_dim]` put where the features of `x` are: `[..., feature]`.

        Where the module holds more heads than there are values, neighbours share one; where it holds fewer, all of
        those heads have the same features.
        """
        lead = next(iter(values.values())).shape[:-2]
        dtype = accumulation_dtype(x.dtype)
        laid_out = torch.zeros(*lead, x.shape[-1], dtype=dtype, device=x.device)
        for role, start, index in self._places:
            if role not in values:
                continue
            heads, features = index.shape
            value = values[role][..., start : start + features].to(x.device, dtype)
            given = value.shape[-2]
            value = value.repeat_interleave(heads // given, -2) if heads > given else value[..., :: given // heads, :]
            laid_out[..., index.flatten()] = value.flatten(-2)
        return laid_out


def edits_of(site: AttentionSite, storage: Storage, module: str, assignment: Assignment) -> list[Edit]:
    """The edits of one projection's output, one for each treatment that occurs in it."""
    places = []
    for role, parts in storage.features.items():
        start = 0
        for part in parts:
            if part.module == module:
                places.append(Place(role, start, part.features))
            start += part.features.shape[1]
    return _edits(site, places, storage.widths[module], assignment)


def edits_of_z(site: AttentionSite, assignment: Assignment) -> list[Edit]:
    """The edits of the output projection's input."""
    return _edits(site, [Place("z", 0, site.layout.z)], site.layout.z.numel(), assignment)


def _edits(site: AttentionSite, places: Sequence[Place], width: int, assignment: Assignment) -> list[Edit]:
    masks: dict[Treatment, Tensor] = {}
    for place in places:
        sharing = site.heads // len(place.features)  # the assignment counts query heads, the storage may share
        for head, treatment in enumerate(assignment[place.role][::sharing]):
            if treatment is not None:
                mask = masks.setdefault(treatment, torch.zeros(width, dtype=torch.bool))
                mask[place.features[head]] = True
    return [Edit(treatment, mask, places, _tables(site, treatment, places)) for treatment, mask in masks.items()]


def _tables(site: AttentionSite, treatment: Treatment, places: Sequence[Place]) -> dict[Role, NoiseTable]:
    """A table of draws for each role, with the heads that the model itself has: those that share one share its draw."""
    if treatment.freeze_type != FreezeType.NOISE:
        return {}
    tables = {}
    for role in dict.fromkeys(place.role for place in places):
        heads = site.kv_heads if role in ("k", "v") else site.heads
        features = site.layout.features(role)
        tables[role] = NoiseTable((treatment.seed, site.layer, ROLES.index(role)), heads, features)
    return tables
