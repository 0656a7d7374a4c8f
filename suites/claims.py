"""A claim about a frozen model: compared, measured, and refused with a message that says where it broke."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Claim", "ClaimBroken", "Margin", "NotApplicable"]


class ClaimBroken(AssertionError):
    """An engine did not do what the claim says."""


class NotApplicable(Exception):
    """A claim says nothing about this model; the message says why."""


class Margin(NamedTuple):
    """How close a claim came to its bound.

    Args:
        error: largest absolute difference, in the unit of what was compared.
        bound: largest one that rounding explains; 0.0 is bit for bit.
    """

    error: float
    bound: float


class Claim:
    """Collects the comparisons of one check and keeps the margin that was closest to its bound.

    Args:
        sentence: the claim, in words; opens every message.
        circumstances: what it is claimed about (model, config, batch), by name; shown in every message.
    """

    def __init__(self, sentence: str, **circumstances: object) -> None:
        self.sentence = sentence
        self.circumstances = circumstances
        self.margin = Margin(0.0, 0.0)

    def same(self, what: str, got: Tensor, want: Tensor, axes: str = "") -> None:
        """Demands that two tensors are equal bit for bit (nan equals nan, 0.0 equals -0.0).

        Args:
            what: names the tensor in the message.
            got, want: what the engine gave and what it should have given, of one shape.
            axes: names of the dimensions, such as `"batch token head feature"`.

        Raises:
            ClaimBroken: they differ.
        """
        self.within(what, got, want, 0.0, axes)

    def within(self, what: str, got: Tensor, want: Tensor, bound: float | Tensor, axes: str = "") -> None:
        """Demands that no element differs by more than `bound` (a number, or a tensor that broadcasts).

        Raises:
            ClaimBroken: one does, or the shapes differ, or one is nan and the other is not.
        """
        if got.shape != want.shape:
            self.broken(f"{what} has shape {list(got.shape)}, not {list(want.shape)}")
        if got.numel() == 0:
            return
        got, want = got.detach().double(), want.detach().double()
        # A bound that is nan allows nothing.
        bounds = torch.as_tensor(bound, dtype=torch.float64).nan_to_num(nan=0.0).expand(got.shape)
        alike = (got == want) | (got.isnan() & want.isnan())
        error = torch.where(alike, 0.0, (got - want).abs()).nan_to_num(nan=torch.inf)
        excess = torch.where(alike, -torch.inf, error - bounds).flatten()
        worst = int(excess.argmax())
        if excess[worst] > 0:
            place = _place(worst, got.shape, axes)
            largest, allowed = float(error.flatten()[worst]), float(bounds.flatten()[worst])
            rule = "bit for bit" if allowed == 0 else f"within {allowed:.3g}"
            self.broken(
                f"{what} differs by {largest:.3g} at {place}: {float(got.flatten()[worst]):.9g} where "
                f"{float(want.flatten()[worst]):.9g} was due, {rule}"
            )
        closest = int((error / bounds.clamp_min(1e-300)).flatten().argmax())
        self.observe(float(error.flatten()[closest]), float(bounds.flatten()[closest]))

    def compared(
        self, what: str, pair: Callable[[Any], tuple[Tensor, Tensor, float | Tensor]], config: object, axes: str = ""
    ) -> None:
        """Demands, where the unfrozen model keeps to it, that what `pair` gives for a config is `within` its bound.

        Args:
            pair: makes what the engine gave, what it should have given, and the bound; of `None`, unfrozen.

        Raises:
            ClaimBroken: it is broken under the freeze alone.
            NotApplicable: the unfrozen model breaks it, too.
        """
        try:
            self.within(what, *pair(config), axes)
        except ClaimBroken:
            clean = Claim(self.sentence)
            try:
                clean.within(what, *pair(None), axes)
            except ClaimBroken as own:
                raise NotApplicable(f"not even of the unfrozen model: {own}") from None
            raise

    def observe(self, error: float, bound: float) -> None:
        """Keeps `Margin(error, bound)` if it is closer to its bound than what was kept before."""
        if _ratio(error, bound) >= _ratio(*self.margin):
            self.margin = Margin(error, bound)

    def demand(self, truth: bool, otherwise: str) -> None:
        """Demands a plain fact.

        Raises:
            ClaimBroken: it is false; `otherwise` says what was found.
        """
        if not truth:
            self.broken(otherwise)

    def broken(self, finding: str) -> None:
        """Refuses the engine.

        Raises:
            ClaimBroken: always.
        """
        lines = [f"{name}: {_shown(value)}" for name, value in self.circumstances.items()]
        raise ClaimBroken("\n  ".join([f"{self.sentence}: {finding}", *lines]))


def _ratio(error: float, bound: float) -> float:
    return 0.0 if error == 0 else error / max(bound, 1e-300)


def _place(flat: int, shape: torch.Size, axes: str) -> str:
    names = axes.split() or [f"axis {number}" for number in range(len(shape))]
    index = torch.unravel_index(torch.tensor(flat), shape) if shape else ()
    return ", ".join(f"{name} {int(at)}" for name, at in zip(names, index, strict=True)) or "its only element"


def _shown(value: object) -> str:
    if isinstance(value, torch.nn.Module):
        return type(value).__name__
    return str(getattr(value, "name", value))
