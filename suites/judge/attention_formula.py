"""How a family that the judge knows by heart attends, in numbers of any dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pytest_circuitfreeze.suites.judge.judged_sites import Role

__all__ = ["Formula"]


@dataclass(frozen=True)
class Formula:
    """What makes scores of queries and keys.

    Args:
        head_dim: features a head.
        scaling: factor of the score `q . k`, on whichever side the family applies it.
        window: how many latest tokens a query sees, itself included; `None` is all.
        rotary: whether queries and keys are rotated by the tables that the module is handed.
        scales_query: whether the query is scaled before it meets the keys, rather than the score.
        float32_softmax: whether the eager softmax is taken in float32 whatever the model's dtype.
    """

    head_dim: int
    scaling: float
    window: int | None
    rotary: bool
    scales_query: bool
    float32_softmax: bool

    def used(self, role: Role, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """The activation `[batch, token, head, head_dim]` as attention reads it, `[batch, head, token, head_dim]`.

        Scaled where the family scales its queries, rotated by the model's own tables where it rotates.
        """
        x = x.transpose(1, 2)
        if role == "q" and self.scales_query:
            x = x * self.scaling
        return x if role == "v" or rotary is None else _rotate(x, *rotary)

    def unused(self, role: Role, seen: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Inverse of `used`."""
        if role != "v" and rotary is not None:
            cos, sin = rotary
            length = cos.double().square() + sin.double().square()
            seen = _rotate(seen, cos.double() / length, -sin.double() / length)
        if role == "q" and self.scales_query:
            seen = seen / self.scaling
        return seen.transpose(1, 2)

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        """Scores `[batch, head, query, key]` of queries and keys as attention reads them."""
        return q @ k.transpose(-1, -2) * (1.0 if self.scales_query else self.scaling)

    def visible(self, real: Tensor) -> Tensor:
        """`[batch, 1, query, key]`: causal, within the window, and not padding.

        Args:
            real: `[batch, token]` bool, true where a token is not padding.
        """
        at = torch.arange(real.shape[1], device=real.device)
        back = at[:, None] - at[None, :]
        allowed = back >= 0
        if self.window is not None:
            allowed &= back < self.window
        return allowed & real[:, None, None, :]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: features `i` and `i + n/2` of the first `n` turn. `x` is `[batch, head, token, feature]`."""
    width = cos.shape[-1]
    turned, kept = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, dim=-1)
    across = torch.cat([-second, first], dim=-1)
    return torch.cat([turned * cos[:, None].to(x) + across * sin[:, None].to(x), kept], dim=-1)
