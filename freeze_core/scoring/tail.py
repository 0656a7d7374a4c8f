"""The end of a pass at the wanted positions only: the last layer's MLP, and the unembedding of several passes at once.

At other positions a restricted module gives zeros. Whether that spoils the wanted ones is found out with nan in the
place of the zeros: what depends on them in any way is nan then.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from freeze_core.errors import InterventionError
from freeze_core.forward_patch import ForwardPatch
from freeze_core.scoring.batches import Batch

__all__ = ["Tail", "position_wise"]

WORTHWHILE = 256
"""Positions that are unembedded at once: for fewer the product is slower, for one 9 times a position."""

LARGEST = 2**24
"""Logits that are made at once, of one pass at least."""


class AtPositions(ForwardPatch):
    """Stands in for the forward of a module that treats each position by itself, and runs it at the wanted ones."""

    def __init__(self, module: nn.Module, batch: Batch) -> None:
        super().__init__(module)
        self.batch = batch
        self.rest = 0.0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        if not isinstance(x, Tensor) or x.shape[:2] != (self.batch.rows, self.batch.columns):
            return self.original(*args, **kwargs)
        wanted = self.original(self.batch.at_positions(x))
        if not isinstance(wanted, Tensor) or wanted.shape[:2] != self.batch.positions.shape:
            raise InterventionError(f"a {type(self.module).__name__} does not give a tensor [batch, token, …]")
        whole = wanted.new_full((*x.shape[:2], *wanted.shape[2:]), self.rest)
        whole[self.batch.index(x.device)] = wanted
        return whole


class Unembedding(ForwardPatch):
    """Stands in for the forward of the module that makes logits of the last states."""

    def __init__(self, module: nn.Module, batch: Batch) -> None:
        super().__init__(module)
        self.batch = batch
        self._rows = batch.rows
        self._like = torch.empty(0)
        self.doing: Literal["look", "skip", "keep", "give", "run"] = "look"
        self.states: list[Tensor | None] = []
        self.runs = 0
        self.width = 0

    @property
    def words(self) -> int:
        """The size of the vocabulary, once the module ran."""
        return self._like.shape[-1]

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.runs += 1
        if self.doing == "look":
            logits = self.original(states, *args, **kwargs)
            self.width = states.shape[-1]
            self._like = logits.new_empty(0, *logits.shape[1:])
            return logits
        if states.shape[:2] != (self.batch.rows, self.batch.columns):
            raise InterventionError(f"the unembedding is given {list(states.shape)}, not [batch, token, feature]")
        if self.doing == "run":
            return self.original(self.batch.at_positions(states), *args, **kwargs)
        if self.doing in ("skip", "keep"):
            if self.doing == "keep":
                self.states += self.batch.at_positions(states).split(self._rows)
            return self._like.new_zeros(self.batch.rows, 1, *self._like.shape[2:])
        kept, self.states = _filled(self.states), []
        return self.original(kept, *args, **kwargs)


def _filled(states: Sequence[Tensor | None]) -> Tensor:
    """All states in their order, zeros in the place of those that were left out.

    The product is then of the same shape, and each pass has the same rows of it, whichever passes are left out: its
    logits are the same bits.
    """
    like = next(one for one in states if one is not None)
    return torch.cat([torch.zeros_like(like) if one is None else one for one in states])


def position_wise(layer: nn.Module, others: Sequence[nn.Module]) -> list[nn.Module]:
    """The parts of a layer that may treat each position by itself: those with matrices that hold none of `others`."""
    return [
        part
        for part in layer.children()
        if any(parameter.dim() > 1 for parameter in part.parameters()) and not set(others) & set(part.modules())
    ]


class Tail:
    """The end of the passes over one batch.

    Args:
        unembedding: what makes logits of the last states.
        parts: parts of the last layer that may treat each position by itself.
    """

    def __init__(self, unembedding: nn.Module, parts: Sequence[nn.Module], batch: Batch) -> None:
        self._batch = batch
        self._unembedding = Unembedding(unembedding, batch)
        self._parts = [] if batch.everywhere else [AtPositions(part, batch) for part in parts]
        self._restricted: list[AtPositions] = []

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Stands in for the unembedding, and for the parts once they are `restricted`."""
        with ExitStack() as stack:
            self._unembedding.attach()
            stack.callback(self._unembedding.detach)
            stack.callback(self.unrestrict)
            yield

    @property
    def runs(self) -> int:
        """How often the unembedding ran."""
        return self._unembedding.runs

    @property
    def width(self) -> int:
        """How many features a logit is the sum of."""
        return self._unembedding.width

    @property
    def at_once(self) -> int:
        """How many passes have their states unembedded together."""
        words = max(1, self._unembedding.words)
        return max(1, min(WORTHWHILE, LARGEST // words) // self._batch.positions.numel())

    def restrict(self) -> None:
        """Runs the parts at the wanted positions only, from now on, with nan elsewhere until `trust`."""
        for part in self._parts:
            part.rest = math.nan
            part.attach()
            self._restricted.append(part)

    def unrestrict(self) -> None:
        """Runs the parts everywhere again."""
        while self._restricted:
            self._restricted.pop().detach()

    def trust(self) -> None:
        """From now on the parts give zeros at other positions, which cost nothing to go on with."""
        for part in self._restricted:
            part.rest = 0.0

    def leave_out(self) -> None:
        """Keeps the place of a pass that is not run."""
        self._unembedding.states.append(None)

    def forget(self) -> None:
        """Drops states that were kept."""
        self._unembedding.states = []

    @contextmanager
    def over(self, copies: Batch) -> Iterator[None]:
        """Passes are over copies of the batch, the states of each of which are kept by themselves."""
        modules: list[AtPositions | Unembedding] = [self._unembedding, *self._parts]
        try:
            for module in modules:
                module.batch = copies
            yield
        finally:
            for module in modules:
                module.batch = self._batch

    @contextmanager
    def doing(self, what: Literal["skip", "keep", "give", "run"]) -> Iterator[None]:
        """`skip` the unembedding, `keep` its states, `give` the logits of all that were kept, or `run` it."""
        before, self._unembedding.doing = self._unembedding.doing, what
        try:
            yield
        finally:
            self._unembedding.doing = before
