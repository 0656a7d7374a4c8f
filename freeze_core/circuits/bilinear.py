"""How a head's score depends on its query and its key, from the model's own attention code.

A score before the softmax is `q M k` and what depends on `q` and `k` not at all, or on one of them alone. `M` is the
second derivative of the logarithm of the pattern by the two, so that the scaling, rotary positions of whatever kind and
part, and biases on distances are what the model makes of them. Whether the score is bilinear at all is then looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from freeze_core.attention.layout import AttentionSite, Part
from freeze_core.circuits.linear import rounding, wide
from freeze_core.circuits.observing import drawn_tokens, undisturbed
from freeze_core.errors import InterventionError, UnsupportedModelError
from freeze_core.inputs import run
from freeze_core.recording import hearing_patterns
from freeze_core.vocabulary import Role

__all__ = ["score_form"]


def score_form(model: nn.Module, site: AttentionSite, head: int, offset: int) -> Tensor:
    """`M` `[head_dim, head_dim]` of a query and a key `offset` tokens before it, in float32 or wider.

    Raises:
        UnsupportedModelError: the score is not bilinear: norms of the query and the key by themselves, or a soft cap.
        InterventionError: a query sees no key at that distance.
    """
    probe = _Probe(model, site, head, offset)
    form = probe.derivative()
    # As large as a score can be and leave its neighbour a probability: there a soft cap would show.
    target = 8.0 if probe.dtype == torch.float16 else 60.0
    predicted, found = probe.compared(form, target)
    if not abs(predicted - found) <= target * (1e-3 + rounding(probe.dtype)):
        raise UnsupportedModelError(
            f"the score of head {head} of {site.name} is not bilinear in query and key: where the form predicts "
            f"{predicted:.4g}, it changes by {found:.4g} (a norm of each by itself, or a soft cap, comes between); W_Q "
            "and W_K give query and key before that"
        )
    return form


class _Probe:
    """One query and one key of a head, held at drawn values while the model runs on as few tokens as there must be."""

    def __init__(self, model: nn.Module, site: AttentionSite, head: int, offset: int) -> None:
        self.model, self.site, self.head, self.offset = model, site, head, offset
        self.tokens = max(2, abs(offset) + 1)
        self.query, self.key = (self.tokens - 1, self.tokens - 1 - offset) if offset >= 0 else (0, -offset)
        # The key that scores are told apart from, which the query sees too.
        self.other = self.query if offset else 0
        self.dtype = torch.float32
        generator = torch.Generator().manual_seed(0)
        self.q, self.k = torch.randn(2, site.layout.features("q"), generator=generator).unbind()

    def derivative(self) -> Tensor:
        """The second derivative of the score by the query and the key."""
        with undisturbed(self.model):
            scores, leaves = self._scores(1, self.q, self.k)
            if bool(scores.isneginf()):
                raise InterventionError(
                    f"offset={self.offset}: a query of {self.site.name} sees no key there (of what comes later, or "
                    "outside of a window)"
                )
            by_query = self._read("q", _gradients(scores[0], leaves, create_graph=True), self.query)
            rows = [self._read("k", _gradients(one, leaves), self.key) for one in by_query]
        return wide(torch.stack(rows).detach())

    def compared(self, form: Tensor, target: float) -> tuple[float, float]:
        """What `form` predicts of a score of about `target`, and what it is, less what is not of both of the two."""
        score = float(self.q.to(form) @ form @ self.k.to(form))
        query = self.q * (target / max(abs(score), 1e-30))
        on = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        with undisturbed(self.model), torch.no_grad():
            scores, _ = self._scores(4, on[:, :1] * query, on[:, 1:] * self.k)
        both, first, second, none = wide(scores).tolist()
        return float(query.to(form) @ form @ self.k.to(form)), both - first - second + none

    def _scores(self, rows: int, q: Tensor, k: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The score of the query and the key over that of the other key `[row]`, and what stands in for projections."""
        leaves: dict[str, Tensor] = {}
        patterns: list[Tensor] = []
        storage = self.site.layout.shared

        def stand_in(name: str) -> Callable[..., Tensor]:
            def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
                if output.shape[-1] != storage.widths[name]:
                    raise UnsupportedModelError(f"{name} gives {output.shape[-1]} features: its heads are spread")
                leaf = output.detach().reshape(rows, self.tokens, -1).clone()
                self._write("q", name, leaf, self.query, q)
                self._write("k", name, leaf, self.key, k)
                leaves[name] = leaf.requires_grad_()
                self.dtype = leaf.dtype
                return leaf.view(output.shape)

            return hook

        with ExitStack() as stack:
            for name, module in storage.modules.items():
                stack.callback(module.register_forward_hook(stand_in(name)).remove)
            stack.enter_context(
                hearing_patterns(self.model, [self.site], lambda site, pattern: patterns.append(pattern))
            )
            run(self.model, drawn_tokens(self.model, rows, self.tokens))
        if len(patterns) != 1:
            raise UnsupportedModelError(
                f"{self.site.name} formed {len(patterns)} patterns in a pass: there is no one score to look at"
            )
        row = patterns[0][:, self.head, self.query]
        return (row[:, self.key].log() - row[:, self.other].log()), leaves

    def _features(self, role: Role, part: Part) -> Tensor:
        # A part of fewer heads than there are is shared by neighbours.
        return part.features[self.head * len(part.features) // self.site.heads]

    def _write(self, role: Role, name: str, leaf: Tensor, at: int, values: Tensor) -> None:
        """Puts `values` at token `at`; of a key, 0 at all others."""
        start = 0
        for part in self.site.layout.shared.features[role]:
            features = self._features(role, part)
            if part.module == name:
                if role == "k":
                    leaf[:, :, features] = 0
                leaf[:, at, features] = values[..., start : start + len(features)].to(leaf)
            start += len(features)

    def _read(self, role: Role, values: Mapping[str, Tensor], at: int) -> Tensor:
        """The head's features `[head_dim]` at token `at` of the first row."""
        parts = self.site.layout.shared.features[role]
        return torch.cat([values[part.module][0, at, self._features(role, part)] for part in parts])


def _gradients(of: Tensor, leaves: dict[str, Tensor], create_graph: bool = False) -> dict[str, Tensor]:
    """The gradients by each of `leaves`, 0 where there is none; the graph is kept."""
    return torch.autograd.grad(of, leaves, retain_graph=True, create_graph=create_graph, materialize_grads=True)
