"""Drawing the parameters of a model whose names nobody knows beforehand.

`models.draw_parameters` goes by the names of the built-in tiny architectures. Here a parameter's place decides: what
kind of module holds it, and what value the model's own class starts it from.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from pytest_circuitfreeze.shrinking_rules import HIDDEN

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

SPREAD = 0.3
"""Standard deviation of what is no matrix: biases, norms' weights, decays."""

SHARPNESS = 1.6
"""How much larger queries and keys are than what they are made from. Scores then spread by more than 2, so patterns are
far from uniform without being a choice of one."""

_QUERIES_AND_KEYS = re.compile(r"(^|[._])(w?(q|k|kv|qk|qkv|qkvz)|query|key|pack|c_attn|(q|k)_(a|b|lin))([._]|$)")


def draw(model: PreTrainedModel, seed: int, sharpness: float = SHARPNESS) -> None:
    """Draws every parameter of `model` in place, as a function of `seed` and of the class alone.

    A norm's weight is drawn around the 1 that the class starts it from (or the 0, where the class adds the 1 itself), a
    decay around its own start, a bias around 0. A matrix keeps the size of what it multiplies; that of queries and of
    keys is `sharpness` times larger.

    Args:
        model: any; its parameters hold the values that the class starts from.
        seed: of a generator that is made here; torch's own are left as they are.
        sharpness: less for a type that does not divide its scores by the root of the head size.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    holders = dict(model.named_modules())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            holder = holders[name.rpartition(".")[0]]
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if isinstance(holder, torch.nn.Embedding):
                parameter.copy_(noise)
            elif parameter.ndim < 2 or _starts_elsewhere(parameter):
                parameter.copy_(_start(parameter) + SPREAD * noise)
            else:
                size = sharpness if _QUERIES_AND_KEYS.search(name) else 1.0
                parameter.copy_(size * noise / math.sqrt(_inputs(holder, parameter)))


def _starts_elsewhere(parameter: Tensor) -> bool:
    """Whether the class starts a matrix from set values rather than from noise around 0."""
    values = parameter.double()
    return bool(values.mean().abs() > values.std(correction=0) / 2) and bool(values.any())


def _start(parameter: Tensor) -> Tensor | float:
    return parameter.double() if _starts_elsewhere(parameter) else 0.0


def _inputs(holder: nn.Module, weight: Tensor) -> int:
    """How many features a matrix sums over; where its module does not say, the hidden size, which all are close to."""
    from torch import nn
    from torch.nn.modules.conv import _ConvNd

    return math.prod(weight.shape[1:]) if isinstance(holder, nn.Linear | _ConvNd) else HIDDEN
