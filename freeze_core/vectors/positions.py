"""Which positions of a pass a vector is added to."""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch
from torch import Tensor

from freeze_core.arguments import is_distinct, is_index, refuse
from freeze_core.errors import InterventionError
from freeze_core.freezing.compile_checks import require
from freeze_core.freezing.passes import Pass

__all__ = ["Positions"]


class Positions:
    """Positions of a sequence, padding and cached tokens counted.

    A list names columns that are to be there: one that a pass has not reached yet, or that is padding, is an error. A
    `range` is a window: of it a pass has what it has, so that a cached step, or a chunk, goes on where the last one
    ended. `last`, the last real token of each row, and negative columns are counted from the end of a pass, which is
    another column at each cached step than it was when the cache was filled: such a step is an error.

    Args:
        given: `all`, `last`, a list of columns, or a `range` of them.

    Raises:
        InterventionError: anything else.
    """

    def __init__(self, given: object) -> None:
        self.given: str | tuple[int, ...] | range
        if isinstance(given, range) and len(given) and min(given) >= 0:
            self.given = given
        else:
            self.given = given if isinstance(given, str) and given in ("all", "last") else _columns(given)
        self.at = str(list(self.given) if isinstance(self.given, tuple) else self.given)
        """The same as text, made once: a compiled pass cannot."""

    def __str__(self) -> str:
        return self.at

    def chosen(self, x: Tensor, running: Pass | None) -> tuple[Tensor, Tensor | None]:
        """`x` `[batch, token, hidden]`, what this pass gives, and which of its positions are meant.

        Returns:
            `x`, which carries what is demanded of the pass where that is compiled, and a mask bool that broadcasts to
            `[batch, token]`; `None` is all.

        Raises:
            InterventionError: a column that the pass has not, or a pass that cannot be served.
        """
        if self.given == "all":
            return x, None
        if running is None:
            raise InterventionError(
                f"positions={self.at}: needs to know the running pass, but the layer was run by itself: run the "
                "model, or the module that holds its layers, or add the vector at positions='all'"
            )
        if running.end > running.cached and running.end - running.cached != x.shape[1]:
            raise InterventionError(
                f"positions={self.at}: the layer gives {x.shape[1]} columns for {running.end - running.cached} tokens, "
                "so that they cannot be told: add the vector at positions='all'"
            )
        if self.given == "last":
            return self._last(x, running)
        if isinstance(self.given, range):
            start = running.column(x.shape[1])
            return x, _mask(self.given, start, x)
        assert isinstance(self.given, tuple)
        return self._listed(self.given, x, running)

    def _last(self, x: Tensor, running: Pass) -> tuple[Tensor, Tensor]:
        self._refuse_cached(running)
        x, real = running.real(x)
        columns = torch.arange(x.shape[1], device=x.device)
        if real is None:
            return x, columns == x.shape[1] - 1
        real = real.to(x.device)
        x = require(x, real.any(1).all(), "positions=last: attention_mask leaves a row without a real token")
        return x, columns == (columns * real).argmax(1, keepdim=True)

    def _listed(self, given: Sequence[int], x: Tensor, running: Pass) -> tuple[Tensor, Tensor]:
        if min(given) < 0:
            self._refuse_cached(running)
        start = running.column(x.shape[1])
        end = start + x.shape[1]
        for one in given:
            if not -end <= one < end:
                raise InterventionError(
                    f"positions={self.at}: {one} is out of range; the pass ends with column {end - 1}, padding and "
                    f"cached tokens counted (a range, range({one}, {one + 1}), waits for later passes)"
                )
        resolved = {one % end for one in given}
        if len(resolved) < len(given):
            raise InterventionError(f"positions={self.at}: names the same of {end} columns twice")
        chosen = _mask(resolved, start, x)
        mask, _ = running.padding_mask()
        if mask is not None and mask.shape[1] == end:
            real = mask[:, start:].to(x.device)
            x = require(
                x,
                (real | ~chosen).all(),
                f"positions={self.at}: one of them is padding in some row, where a vector does nothing: name columns "
                "that are real in all rows, or 'last' or 'all'",
            )
        return x, chosen

    def _refuse_cached(self, running: Pass) -> None:
        if running.cached:
            raise InterventionError(
                f"positions={self.at}: counted from the end of a pass, it is another column in this pass, after "
                f"{running.cached} cached tokens, than where the cache was filled: give columns from the front, as in "
                "range(prompt_length - 1, 10_000), add the vector at positions='all', or run each pass whole "
                "(use_cache=False)"
            )


def _mask(columns: Container[int], start: int, x: Tensor) -> Tensor:
    """Which of the columns of `x` `[batch, token, hidden]`, from `start` on, are among `columns`: `[token]` bool."""
    chosen = [one in columns for one in range(start, start + x.shape[1])]
    return torch.tensor(chosen, dtype=torch.bool, device=x.device)


def _columns(given: object) -> tuple[int, ...]:
    if isinstance(given, range) or not is_distinct(given, is_index):
        refuse(
            "positions",
            given,
            "'all', 'last', a list of distinct columns (ints), or a range of them from 0 on, not empty",
        )
    return tuple(int(column) for column in given if is_index(column))
