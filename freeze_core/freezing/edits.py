"""One treatment of one module's activation: which features, which replacement, which gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from freeze_core.errors import InterventionError
from freeze_core.freezing.backward import blend
from freeze_core.freezing.module_features import ModuleFeatures
from freeze_core.freezing.passes import Pass
from freeze_core.freezing.replacements import Replacement
from freeze_core.vocabulary import BackwardMode, Role

__all__ = ["Edit", "Treatment", "edits_of"]


@dataclass(frozen=True)
class Treatment:
    """What is done to one head's activation: its replacement, how much of it, and what its gradient is."""

    replacement: Replacement
    backward_mode: BackwardMode
    strength: float

    @property
    def key(self) -> str:
        """What decides the frozen value, as text."""
        return f"{self.replacement.freeze_type} {self.strength} {self.replacement.key}"


class Edit:
    """One treatment of the features in `mask` (`[feature]` bool) of one module's activations."""

    def __init__(self, treatment: Treatment, mask: Tensor, features: ModuleFeatures) -> None:
        self.treatment = treatment
        self.mask = mask
        self.needs_clean_backward = treatment.backward_mode == BackwardMode.CIRCUIT_STE
        """Whether gradients are to flow as if this edit had not been made."""
        self._constant = treatment.replacement.constant
        self._value = treatment.replacement.in_module(features)

    def apply(self, x: Tensor, frozen: Tensor, running: Pass | None) -> Tensor:
        """`frozen` with this edit made; `x` is the activation before any, both `[batch, token, feature]`."""
        mask = self.mask if self.mask.device == x.device else self.mask.to(x.device)
        r = self._constant
        if r is None:
            if running is None:
                raise InterventionError(
                    f"freeze_type '{self.treatment.replacement.freeze_type}' needs to know the running pass, but the "
                    "layer was run by itself: run the model, or the module that holds its layers"
                )
            r = self._value(x.detach(), running)
        return blend(x, frozen, mask, r, self.treatment.strength, self.treatment.backward_mode)


def edits_of(features: ModuleFeatures, assignment: Mapping[Role, Sequence[Treatment | None]]) -> list[Edit]:
    """The edits of one module's activation, one for each treatment that `assignment` has for its heads."""
    masks: dict[Treatment, Tensor] = {}
    for role, _, index in features.parts:
        sharing = features.site.heads // len(index)  # the assignment counts query heads, the storage may share
        for head, treatment in enumerate(assignment[role][::sharing]):
            if treatment is not None:
                mask = masks.setdefault(treatment, torch.zeros(features.width, dtype=torch.bool))
                mask[index[head]] = True
    return [Edit(treatment, mask, features) for treatment, mask in masks.items()]
