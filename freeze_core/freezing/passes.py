"""The forward pass that is running: what a freeze needs to know of it beyond the activation itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from freeze_core.errors import InterventionError
from freeze_core.freezing.compile_checks import require
from freeze_core.freezing.padding_mask import UnknownMask

__all__ = ["Pass"]


class Pass:
    """One forward pass through a stack of decoder layers.

    Args:
        attention_mask: as the stack was given it: `None`, or `[batch, cached + token]` with 0 for padding; an
            `UnknownMask` where what was given does not say.
        cached: tokens in the cache before this pass.
        tokens: tokens of this pass.
        encoder: the same of the encoder's states that cross-attention reads, if there are any.
        cross_cached: whether keys and values of those states are in the cache already.
        rows: of this pass; 0 where that is not told.
    """

    def __init__(
        self,
        attention_mask: Any,
        cached: int = 0,
        tokens: int = 0,
        encoder: Pass | None = None,
        cross_cached: bool = False,
        rows: int = 0,
    ) -> None:
        self.attention_mask = attention_mask
        self.cached = cached
        self.encoder = encoder
        self.cross_cached = cross_cached
        self.tokens = tokens
        self.end = cached + tokens
        self.rows = rows
        self.differentiated = False
        """Whether gradients were on where the pass began, and it is not compiled as a whole."""
        self.ran: set[str] = set()
        """The frozen attentions that have run, by their paths in the stack."""
        self.runs: dict[str, int] = {}
        self.turn = 0

    def begin_run(self, attention: str) -> None:
        """Notes that `attention` runs, again where the model loops over its layers: what it reads is of this run."""
        self.turn = self.runs.get(attention, 0)
        self.runs[attention] = self.turn + 1
        if self.encoder:
            self.encoder.turn = self.turn

    def runs_so_far(self) -> tuple[dict[str, int], int]:
        """Which runs are over, and which one is on."""
        return dict(self.runs), self.turn

    def go_back(self, runs: tuple[dict[str, int], int]) -> None:
        """Goes back to where `runs_so_far` was called: what follows is run again."""
        self.runs, self.turn = dict(runs[0]), runs[1]
        if self.encoder:
            self.encoder.turn = self.turn

    def of_this_run(self, values: Tensor, dims: int, what: str) -> Tensor:
        """Of values `[run, ...]` of a layer that runs several times, this run's; of `dims` dimensions, of the only one.

        Raises:
            InterventionError: the layer runs more often than the values were taken.
        """
        runs = values if values.dim() > dims else values[None]
        if self.turn >= len(runs):
            raise InterventionError(
                f"{what} {len(runs)} run{'s' * (len(runs) > 1)} of a layer that runs once more in this pass: take it "
                "of this model, as it is configured now"
            )
        return runs[self.turn]

    def is_token_first(self, shape: torch.Size) -> bool:
        """Whether an activation is `[token, batch, feature]`; that it is cannot be seen where there are as many."""
        return shape[0] != self.rows and shape[0] == self.tokens and shape[1] == self.rows

    def column(self, tokens: int) -> int:
        """The column of the first of `tokens` activations: they end with the pass, or begin with the cache.

        Raises:
            InterventionError: there is a cache, and the model does not say how many tokens this pass adds to it.
        """
        if self.cached and self.end == self.cached:
            raise InterventionError(
                f"this pass goes on after {self.cached} cached tokens, and how many it has is not told, since the "
                "model has no argument input_ids or inputs_embeds, so that noise would be drawn for other columns: run "
                "without a cache"
            )
        if fault := self._other_columns(tokens):
            raise InterventionError(f"{fault}: noise would be drawn for other columns; freeze with zero or a mean")
        return max(0, self.end - tokens)

    def _other_columns(self, tokens: int) -> str:
        """Why `tokens` activations in a row are not the pass's columns, or those with cached ones before them.

        A stack may pad its input by itself, to a multiple of a window, say, or put tokens of its own before it. Latent
        attention sees the cached columns again, or those of them that its window has kept.
        """
        if not self.tokens or tokens == self.tokens or (self.cached and self.tokens < tokens <= self.end):
            return ""
        return f"an attention layer was given {tokens} columns in a pass of {self.tokens} tokens"

    def real(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """`x` `[batch, token, feature]` and which positions are not padding, `[batch, token]` bool; `None` is all.

        Raises:
            InterventionError: the mask is not a padding mask for these positions, so that padding cannot be told.
        """
        mask, fault = self.padding_mask()
        if mask is not None and mask.shape != x.shape[:2]:
            fault = (
                f"attention_mask is {list(mask.shape)} and the activations are {list(x.shape[:2])} [batch, token]: "
                "statistics of the pass need a mask of the same shape"
            )
        elif other := self._other_columns(x.shape[1]):
            fault = fault or f"{other}: which of them are padding is unknown; freeze with zero, or with noise_std"
        return require(x, not fault, fault), None if fault else mask

    def without_padding(self, x: Tensor) -> Tensor:
        """`x` `[batch, token, feature]`, if each of its rows can be taken from another one.

        Raises:
            InterventionError: there is only one, or there is padding.
        """
        (mask, fault), rows = self.padding_mask(), len(x)
        return require(
            require(x, not fault, fault),
            rows > 1 and (mask is None or mask.all()),
            f"freeze_type 'resample' takes the same column of another row, and this pass has {rows} row"
            f"{'s with padding' if rows > 1 else ''}: give at least two rows of the same length, without padding",
        )

    def padded_alike(self, x: Tensor, recorded: Tensor | None) -> Tensor:
        """`x`, what was recorded, if this pass pads as the one did whose `attention_mask` was `recorded`.

        Raises:
            InterventionError: it does not.
        """
        mask, fault = self.padding_mask()
        x = require(x, not fault, fault)
        if fault or (recorded is None and mask is None):
            return x
        mask = torch.ones((), dtype=torch.bool) if mask is None else mask
        before = torch.ones((), dtype=torch.bool) if recorded is None else recorded != 0
        alike = 0 in (before.dim(), mask.dim()) or before.shape[1:] == mask.shape[1:]
        return require(
            x,
            alike and (before.to(mask.device) == mask).all(),
            "the reference was recorded under another attention_mask than that of this pass: record it on inputs that "
            "are padded alike",
        )

    def padding_mask(self) -> tuple[Tensor | None, str]:
        """What is not padding `[batch, token]` bool, `None` if nothing is; or why that cannot be told."""
        mask = self.attention_mask
        if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
            return None if mask is None else mask.bool(), ""
        if isinstance(mask, Tensor):
            given = f"attention_mask is {list(mask.shape)}"
        else:
            given = mask.reason if isinstance(mask, UnknownMask) else f"attention_mask is a {type(mask).__name__}"
        return None, (
            f"{given}: a freeze that depends on padding needs a padding mask [batch, token]; pass "
            "one, freeze through the very model that is given one, or freeze with zero or with noise_std"
        )
