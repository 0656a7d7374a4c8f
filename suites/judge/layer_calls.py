"""What an attention module is called with, kept so that it can be run again, and under which implementation it runs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from pytest_circuitfreeze.suites.judge.judged_sites import CannotJudge
from pytest_circuitfreeze.wrapped import transformers_configs

__all__ = ["SOFTMAX", "Call", "OutputReached", "attention_implementation", "fits_pattern", "hidden_of"]

SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
"""What eager attention may call. Whatever the model is written with, one of them is seen and not what it calls."""


class OutputReached(Exception):
    """A module that is run again has reached its output projection: the rest is not needed."""


@dataclass
class Call:
    """What an attention module was called with: tensors are copies, since a model may write into its own."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def given(self, hidden: Tensor) -> Call:
        """The same call on other hidden states, wherever they are handed over."""
        own = self.hidden
        kwargs = {name: hidden if value is own else value for name, value in self.kwargs.items()}
        return Call(tuple(hidden if value is own else value for value in self.args), kwargs)

    @property
    def hidden(self) -> Tensor:
        """The hidden states."""
        return hidden_of(self.args, self.kwargs)

    def held(self, keep: Tensor | None = None) -> Call:
        """A call whose tensors, but for the hidden states `keep`, and caches are copies."""
        copies: dict[int, Tensor] = {}
        call = Call(_held(self.args, copies), _held(self.kwargs, copies))
        return call if keep is None else call.given(keep)


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Runs `model` with another attention implementation, `"eager"` or `"sdpa"`, for the length of the block.

    The configs' own field is set, which every family reads at each pass: `set_attn_implementation` refuses Falcon.
    """
    configs = transformers_configs(model)
    before = [(config, config._attn_implementation) for config in configs]
    try:
        for config, _ in before:
            config._attn_implementation = name
        yield
    finally:
        for config, old in before:
            config._attn_implementation = old


def fits_pattern(scores: Tensor, rows: int, tokens: int, heads: int) -> bool:
    """Whether `scores` are `[row, head, query, key]`, or rows and heads in one dimension."""
    return scores.dim() in (3, 4) and scores.shape[-2] == tokens and scores[..., 0, 0].numel() == rows * heads


def hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states among what an attention module is called with."""
    name = _hidden_name(args, kwargs)
    found = args[0] if name is None else kwargs[name]
    if not isinstance(found, Tensor):
        raise CannotJudge(f"an attention module is called with a {type(found).__name__} in the place of hidden states")
    return found


def _hidden_name(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """The name under which hidden states are handed over; `None` where they come first, without one."""
    if args:
        return None
    floating = [name for name, value in kwargs.items() if isinstance(value, Tensor) and value.is_floating_point()]
    return "hidden_states" if "hidden_states" in kwargs or not floating else floating[0]


def _held(value: Any, copies: dict[int, Tensor]) -> Any:
    """`value` with tensors copied, one copy of each; `copies` has those made so far."""
    if isinstance(value, Tensor):
        return copies.setdefault(id(value), value.detach().clone())
    if type(value) in (list, tuple):
        return type(value)(_held(one, copies) for one in value)
    if isinstance(value, dict):
        copied = copy.copy(value)
        copied.update({key: _held(one, copies) for key, one in value.items()})
        return copied
    return _held_cache(value) if hasattr(value, "update") and not isinstance(value, nn.Module) else value


def _held_cache(cache: Any) -> Any:
    """A copy of a cache that can be filled without filling the first; caches put new tensors in the place of old."""
    copied = copy.copy(cache)
    for name, value in vars(cache).items():
        if isinstance(value, list):
            vars(copied)[name] = [_held_cache(one) if hasattr(one, "update") else one for one in value]
        elif isinstance(value, dict) or hasattr(value, "update"):
            vars(copied)[name] = copy.copy(value) if isinstance(value, dict) else _held_cache(value)
    return copied
