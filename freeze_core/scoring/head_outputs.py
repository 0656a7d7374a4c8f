"""Actions that record and replace what heads put out: z, at the output projection, and what their attention returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from freeze_core.attention.layout import AttentionSite
from freeze_core.attention.shards import gathered, sharded_like
from freeze_core.errors import UnsupportedModelError

__all__ = ["RecordOutputs", "RecordZ", "ReplaceOutputs"]


class RecordZ:
    """Keeps the input of an output projection in each run, as a tensor that takes gradients.

    Args:
        replacements: of each run, taken in its place; empty for none.
    """

    def __init__(self, site: AttentionSite, replacements: Sequence[Tensor] = ()) -> None:
        self._site = site
        self._replacements = replacements
        self.z: list[Tensor] = []

    def __call__(self, forward: Callable[..., Any], own: Tensor, *args: Any, **kwargs: Any) -> Any:
        z = gathered(own, f"z of {self._site.name}")
        width = self._site.layout.z.numel()
        if z.shape[-1] != width:
            raise UnsupportedModelError(
                f"z of {self._site.name} has {z.shape[-1]} features where {width} were expected: under tensor "
                "parallelism a process sees its own heads only; use method='exact'"
            )
        if self._replacements:
            z = self._replacements[len(self.z)]
        if not z.requires_grad:
            z = z.detach().requires_grad_()
        self.z.append(z)
        return forward(sharded_like(z, own), *args, **kwargs)


class RecordOutputs:
    """Keeps the output of an attention in each run."""

    def __init__(self, site: AttentionSite) -> None:
        self._site = site
        self.outputs: list[Tensor] = []

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        first = output[0] if isinstance(output, tuple) else output
        if not isinstance(first, Tensor):
            raise UnsupportedModelError(
                f"{self._site.name} gives a {type(first).__name__} where a tensor was expected: use method='exact'"
            )
        self.outputs.append(first.detach().clone())  # what comes after may write to it
        return output


class ReplaceOutputs:
    """Runs an attention, and returns `outputs`, one in each run, in place of what it gave."""

    def __init__(self, outputs: Sequence[Tensor]) -> None:
        self._outputs = list(outputs)

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        first = self._outputs.pop(0).clone()
        return (first, *output[1:]) if isinstance(output, tuple) else first
