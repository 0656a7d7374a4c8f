"""Finds by differentiation which features of which projection a head's query, key and value are made of.

It knows no layout, so it judges the tables. The graph is cut at the output of every linear layer of an attention
module, and the model is run on two tokens. Where both are made to have the same features, a head's z does not depend on
its pattern: what it depends on at the other token is its value, and at its own token also its output gate. Where they
differ, it depends on its key too at the other token, and at its own also on its query.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from freeze_core.errors import UnsupportedModelError
from freeze_core.vocabulary import Role

__all__ = ["HeadFeatures", "is_linear", "probe"]

Features = Mapping[str, frozenset[int]]
"""Some features of the outputs of modules, by the module's name."""

HeadFeatures = Mapping[Role, Features]
"""What one head's query, key and value are made of."""

DRAWS = 3
"""Inputs that are tried: a derivative that happens to vanish on one does not on another."""


def probe(
    model: nn.Module,
    attention: nn.Module,
    output: nn.Module,
    heads: int,
    norms: Sequence[nn.Module] = (),
    gates: Sequence[nn.Module] = (),
    drawn: bool = False,
    draws: int = DRAWS,
) -> list[HeadFeatures]:
    """The features of q, k and v of each query head.

    Args:
        model: takes token ids `[batch, token]`; it is run, not changed.
        attention: the attention module that is looked at.
        output: its output projection, whose input is z.
        heads: query heads.
        norms: norms over all heads, at whose output q and k are looked for.
        gates: what multiplies all of a head's z, which differentiation cannot tell from the mass that a sink takes.
        drawn: put draws of moderate size in the place of what the linear layers give, so that neither weights of zero
            nor large activations, whose pattern is a choice, hide what depends on what.

    Raises:
        UnsupportedModelError: some head has no query, key or value of its own.
    """
    places = {module: name for name, module in attention.named_modules() if is_linear(module) or module in norms}
    for apart in (output, *gates):
        places.pop(apart, None)
    still = _dependence(model, places, output, heads, differ=False, drawn=drawn, draws=draws)
    moving = _dependence(model, places, output, heads, differ=True, drawn=drawn, draws=draws)
    found: list[HeadFeatures] = []
    for (value, value_and_gate), (value_and_key, everything) in zip(still, moving, strict=True):
        key = _without(value_and_key, value)
        query = _without(everything, value, value_and_gate, key)
        roles: HeadFeatures = {"q": query, "k": key, "v": value}
        missing = [role for role, features in roles.items() if not features]
        if missing:
            raise UnsupportedModelError(
                f"{type(attention).__name__}: head {len(found)} depends on no projection as its {', '.join(missing)}"
            )
        found.append(roles)
    return found


def is_linear(module: nn.Module) -> bool:
    """Whether a module's weight is a matrix."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2


def _without(features: Features, *others: Features) -> Features:
    rest = {name: one.difference(*(other.get(name, ()) for other in others)) for name, one in features.items()}
    return {name: one for name, one in rest.items() if one}


def _dependence(
    model: nn.Module,
    places: Mapping[nn.Module, str],
    output: nn.Module,
    heads: int,
    differ: bool,
    drawn: bool,
    draws: int,
) -> list[tuple[Features, Features]]:
    """For each head, what its z at the second of two tokens depends on at the first and at the second."""
    seen: list[dict[str, Tensor]] = [{} for _ in range(heads)]
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    vocabulary = int(getattr(getattr(model, "config", None), "vocab_size", 2))
    for _ in range(draws):
        ids = torch.randint(vocabulary, (1, 2), generator=generator).to(device)
        with _cut(places, output, differ, generator if drawn else None) as (cuts, zs), torch.enable_grad():
            model(input_ids=ids, use_cache=False)
        # The last run, where there are several: a model that loops over its layers may keep gradients of that alone.
        z = zs[-1].reshape(2, heads, -1)[1]
        # In half precision what cancels leaves more; where tokens differ nothing has to cancel.
        floor_of = 1e-5 if differ else max(1e-5, 4 * torch.finfo(z.dtype).eps * (z.dtype.itemsize < 4))
        for head, own in enumerate(z):
            cotangent = torch.randn(len(own), generator=generator, dtype=torch.float64).to(own)
            if drawn:
                cotangent = cotangent.sign()
            if not differ:  # a sink takes weight from all tokens alike, which moves z along itself
                cotangent = cotangent - own.detach() * (cotangent @ own.detach()) / (own.detach() @ own.detach())
            grads = torch.autograd.grad(own @ cotangent, list(cuts.values()), retain_graph=True, allow_unused=True)
            flat = {name: grad.reshape(2, -1).abs() for name, grad in zip(cuts, grads, strict=True) if grad is not None}
            # What cancels but for rounding is no dependence.
            floor = floor_of * max((float(one.max()) for one in flat.values()), default=0.0)
            for name, rows in flat.items():
                moves = rows > floor
                seen[head][name] = seen[head][name] | moves if name in seen[head] else moves
    return [(_features(one, 0), _features(one, 1)) for one in seen]


def _moderate(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Numbers of random sign whose size is between 0.25 and 0.75."""
    size = 0.25 + 0.5 * torch.rand(shape, generator=generator)
    return size * (2 * torch.randint(2, shape, generator=generator) - 1)


def _features(moves: Mapping[str, Tensor], token: int) -> Features:
    features = {name: frozenset(both[token].nonzero().flatten().tolist()) for name, both in moves.items()}
    return {name: one for name, one in features.items() if one}


@contextmanager
def _cut(
    places: Mapping[nn.Module, str], output: nn.Module, differ: bool, generator: torch.Generator | None
) -> Iterator[tuple[dict[str, Tensor], list[Tensor]]]:
    """Cuts the graph behind each of `places`, giving both tokens the features of the first or their own; keeps z.

    The features are drawn by `generator`, if there is one.
    """
    cuts: dict[str, Tensor] = {}
    zs: list[Tensor] = []

    def cut(name: str) -> Any:
        def hook(module: nn.Module, args: Any, result: Tensor) -> Tensor:
            own = result.detach().reshape(2, -1)
            if generator is not None:
                own = _moderate(own.shape, generator).to(own)
            cuts[name] = (own if differ else own[:1].expand(2, -1)).clone().requires_grad_()
            return cuts[name].view(result.shape)

        return hook

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        zs.append(args[0])

    with ExitStack() as stack:
        for module, name in places.items():
            stack.callback(module.register_forward_hook(cut(name)).remove)
        stack.callback(output.register_forward_pre_hook(keep).remove)
        yield cuts, zs
