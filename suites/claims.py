"""A claim about a frozen model: compared, measured, and refused with a message that says where it broke."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import wraps
from typing import Any, NamedTuple, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor

from pytest_circuitfreeze.snippets import Call
from pytest_circuitfreeze.suites.judge.site_lookup import without_formulas

__all__ = ["Claim", "ClaimBroken", "Margin", "NotApplicable", "check", "in_run"]

# pytest leaves the frames of this module out of a traceback: the check that made the demand is the last one shown.
__tracebackhide__ = True

P = ParamSpec("P")
T = TypeVar("T")


class ClaimBroken(AssertionError):
    """An engine did not do what the claim says.

    Args:
        sentence: the claim, in words.
        found: what was found instead.
        place: where, by name (layer, head, row, position, ...): that of the largest error, where there is one.
        margin: the largest error there and the bound that it broke; `None` where nothing was measured.

    Attributes:
        call: the call of the check that found it, from when it has left the check.
    """

    def __init__(self, sentence: str, found: str, place: Mapping[str, int], margin: Margin | None = None) -> None:
        super().__init__(sentence, found, place, margin)
        self.sentence = sentence
        self.found = found
        self.place = dict(place)
        self.margin = margin
        self.call: Call | None = None

    @property
    def headline(self) -> str:
        """Claim, finding and place in one line."""
        return f"{self.sentence}: {self.found}" + (f", at {self._where}" if self.place else "")

    @property
    def _where(self) -> str:
        return ", ".join(f"{name} {at}" for name, at in self.place.items())

    def __str__(self) -> str:
        told = {"found": self.found, "at": self._where}
        if self.margin is not None:
            told["bound"] = f"{self.margin.bound:.3g}" if self.margin.bound else "0, bit for bit"
        lines = [f"  {name}: {text}" for name, text in told.items() if text]
        return "\n".join([self.sentence, *lines, *(self.call.lines() if self.call else ())])


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
    """

    def __init__(self, sentence: str) -> None:
        self.sentence = sentence
        self.margin = Margin(0.0, 0.0)

    def same(self, what: str, got: Tensor, want: Tensor, axes: str = "", **where: int) -> None:
        """Demands that two tensors are equal bit for bit (nan equals nan, 0.0 equals -0.0).

        Args:
            what: names the tensor in the message.
            got, want: what the engine gave and what it should have given, of one shape.
            axes: names of the dimensions, such as `"row position head feature"`.
            where: what is known of the place besides, such as `layer=0`.

        Raises:
            ClaimBroken: they differ.
        """
        self.within(what, got, want, 0.0, axes, **where)

    def within(self, what: str, got: Tensor, want: Tensor, bound: float | Tensor, axes: str = "", **where: int) -> None:
        """Demands that no element differs by more than `bound` (a number, or a tensor that broadcasts).

        Raises:
            ClaimBroken: one does, or the shapes differ, or one is nan and the other is not.
        """
        if got.shape != want.shape:
            self.broken(f"{what} has shape {list(got.shape)}, not {list(want.shape)}", **where)
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
            margin = Margin(float(error.flatten()[worst]), float(bounds.flatten()[worst]))
            one, due = float(got.flatten()[worst]), float(want.flatten()[worst])
            found = f"{what} off by {margin.error:.3g}: {one:.9g} where {due:.9g} was due"
            raise ClaimBroken(self.sentence, found, {**where, **_place(worst, got.shape, axes)}, margin)
        closest = int((error / bounds.clamp_min(1e-300)).flatten().argmax())
        self.observe(float(error.flatten()[closest]), float(bounds.flatten()[closest]))

    def at_most(self, what: str, error: float, bound: float, **where: int) -> None:
        """Demands that what was measured is no larger than `bound`.

        Raises:
            ClaimBroken: it is, or is nan.
        """
        if not error <= bound:
            raise ClaimBroken(self.sentence, f"{what}: {error:.3g}", where, Margin(error, bound))
        self.observe(error, bound)

    def compared(self, compare: Callable[[Claim, Any], None], config: object) -> None:
        """Demands what `compare` demands of a config, where the unfrozen model keeps to it.

        Args:
            compare: makes its demands of the claim that it is handed, about a config; about `None`, unfrozen.

        Raises:
            ClaimBroken: it is broken under the freeze alone.
            NotApplicable: the unfrozen model breaks it, too.
        """
        try:
            compare(self, config)
        except ClaimBroken:
            try:
                compare(Claim(self.sentence), None)
            except ClaimBroken as own:
                raise NotApplicable(f"not even of the unfrozen model: {own.headline}") from None
            raise

    def observe(self, error: float, bound: float) -> None:
        """Keeps `Margin(error, bound)` if it is closer to its bound than what was kept before."""
        if _ratio(error, bound) >= _ratio(*self.margin):
            self.margin = Margin(error, bound)

    def demand(self, truth: bool, otherwise: str, **where: int) -> None:
        """Demands a plain fact.

        Raises:
            ClaimBroken: it is false; `otherwise` says what was found, and `where` in which place.
        """
        if not truth:
            self.broken(otherwise, **where)

    def broken(self, found: str, **where: int) -> NoReturn:
        """Refuses the engine.

        Raises:
            ClaimBroken: always.
        """
        raise ClaimBroken(self.sentence, found, where)


def _ratio(error: float, bound: float) -> float:
    return 0.0 if error == 0 else error / max(bound, 1e-300)


def _place(flat: int, shape: torch.Size, axes: str) -> dict[str, int]:
    names = axes.split() or [f"axis {number}" for number in range(len(shape))]
    index = torch.unravel_index(torch.tensor(flat), shape) if shape else ()
    return {name: int(at) for name, at in zip(names, index, strict=True)}


def in_run(run: int) -> dict[str, int]:
    """A part of a place: which run of a layer, where a model loops over its layers and it is not the first."""
    return {"run": run} if run else {}


def check(function: Callable[P, T]) -> Callable[P, T]:
    """Marks a check, whose failure then tells how it was called, and shows a snippet that calls it so again.

    Of a check that another one calls, it is the inner call that is told. An engine that runs something else in the
    place of a model (`unfrozen`) is looked at where attention begins and ends: what lies between is its own.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        arguments = signature.bind(*args, **kwargs).arguments
        call = Call(function, arguments)
        try:
            with without_formulas() if hasattr(arguments.get("engine"), "unfrozen") else nullcontext():
                return function(*args, **kwargs)
        except ClaimBroken as broken:
            if broken.call is None:
                broken.call = call
                broken.add_note(f"\nWithout pytest:\n\n{call.snippet}")
            raise

    return called
