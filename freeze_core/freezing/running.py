"""The forward pass that is running: what replacements need to know of it beyond the activation itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from freeze_core.errors import InterventionError
from freeze_core.freezing.replaced import ReplacedForward

__all__ = ["Pass", "PassTracker"]


class Pass:
    """One forward pass through a stack of decoder layers.

    Args:
        attention_mask: as the stack was given it: `None`, or `[batch, cached + token]` with 0 for padding.
        cached: tokens in the cache before this pass.
        tokens: tokens of this pass.
    """

    def __init__(self, attention_mask: Any, cached: int, tokens: int) -> None:
        self.attention_mask = attention_mask
        self.cached = cached
        self._end = cached + tokens

    def column(self, tokens: int) -> int:
        """The column of the first of `tokens` activations: they end with the pass, or begin with the cache."""
        return max(0, self._end - tokens)

    def real(self) -> Tensor | None:
        """Which positions of this pass are not padding, `[batch, token]` bool; `None` is all of them.

        Raises:
            InterventionError: the mask is not a padding mask, so that padding cannot be told.
        """
        mask = self.attention_mask
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise InterventionError(
                f"attention_mask is {shape}: statistics of the pass need a padding mask [batch, token] to leave "
                "padding out; pass one, or freeze with zero or with noise_std"
            )
        return mask.bool()


class PassTracker(ReplacedForward):
    """Stands in for the forward of a stack of layers and knows the pass that is running through it."""

    def __init__(self, stack: nn.Module) -> None:
        super().__init__(stack)
        names = list(inspect.signature(self.original).parameters)
        self._places: dict[str, int] = {
            name: names.index(name)
            for name in ("attention_mask", "past_key_values", "input_ids", "inputs_embeds")
            if name in names
        }
        self.current: Pass | None = None
        self.users = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cache = self._argument("past_key_values", args, kwargs)
        cached = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
        given = self._argument("input_ids", args, kwargs)
        tokens = (self._argument("inputs_embeds", args, kwargs) if given is None else given).shape[1]
        running = Pass(self._argument("attention_mask", args, kwargs), cached, tokens)
        if not self.module.training:
            with self._running(running):
                return self.original(*args, **kwargs)
        with self._running(running), self._checkpoints_keep(running):
            return self.original(*args, **kwargs)

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        place = self._places.get(name, len(args))
        return args[place] if place < len(args) else kwargs.get(name)

    @contextmanager
    def _running(self, running: Pass) -> Iterator[None]:
        outer, self.current = self.current, running
        try:
            yield
        finally:
            self.current = outer

    @contextmanager
    def _checkpoints_keep(self, running: Pass) -> Iterator[None]:
        """Gradient checkpointing runs layers again in the backward pass: let each do so in the pass it came from."""
        name = "_gradient_checkpointing_func"
        originals = {module: vars(module)[name] for module in self.module.modules() if name in vars(module)}
        for module, original in originals.items():
            setattr(module, name, self._keeping(running, original))
        try:
            yield
        finally:
            for module, original in originals.items():
                setattr(module, name, original)

    def _keeping(self, running: Pass, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def keeping(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def layer(*inner: Any, **options: Any) -> Any:
                with self._running(running):
                    return function(*inner, **options)

            return checkpoint(layer, *args, **kwargs)

        return keeping
