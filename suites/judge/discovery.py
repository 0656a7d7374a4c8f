"""Finds the attention of a model that the judge knows nothing of, by watching one pass and by differentiation.

Attention is where a softmax over keys is taken. The module around it is the smallest one that goes on to a linear layer
afterwards, its output projection; the softmax says how many heads there are. Which features of which other linear layer
are a head's query, key and value is found by differentiation. No names and no layouts enter, but for those of gates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from freeze_core.attention.probe import HeadFeatures, probe
from freeze_core.errors import UnsupportedModelError
from pytest_circuitfreeze.suites.judge.anatomy import ROLES
from pytest_circuitfreeze.wrapped import device_of, transformers_configs

__all__ = ["SOFTMAX", "Attention", "HeadFeatures", "attention_of", "features_of"]

SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
"""What eager attention may call. Whatever the model is written with, one of them is seen and not what it calls."""

GATES = ("gate_proj", "g_proj")
"""Linear layers whose output multiplies all of a head's z: no part of q, k or v, and by differentiation hard to tell
from the mass that an attention sink takes."""

TOKENS = 5


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention module as a pass showed it.

    Args:
        layer: place of its decoder layer among its siblings.
        name: path of the module in the model.
        output: what takes z, by path in the module: the output projection, or a norm over all heads before it.
        heads: query heads.
        norms: norms over all heads, by path in the module.
        apart: parts that are not to be taken for q, k or v, by path in the module.
    """

    layer: int
    name: str
    output: str
    heads: int
    norms: tuple[str, ...]
    apart: tuple[str, ...]


def attention_of(model: PreTrainedModel) -> list[Attention]:
    """The attention modules of `model`, each of one layer only, found on one pass under eager attention."""
    watch = _Watch(model)
    with watch.watching(), torch.no_grad(), watch:
        model(input_ids=torch.arange(TOKENS, device=device_of(model))[None])
    found: dict[str, Attention | None] = {}
    for call in watch.calls:
        one = watch.attention(call)
        if one is not None:
            # A module that serves several layers cannot be judged in one of them; a layer may run several times.
            known = found.get(one.name, one)
            found[one.name] = one if known is not None and known.layer == one.layer else None
    return [one for one in found.values() if one is not None]


def features_of(model: PreTrainedModel, found: Attention) -> list[HeadFeatures] | None:
    """Features of q, k and v of each query head; `None` where some head has none of its own, so that no judge knows.

    An attention that is not softmax over projections (its heads mixed afterwards, its keys its values) ends here.
    """
    module = model.get_submodule(found.name)
    parts = dict(module.named_modules())
    norms, apart = ([parts[name] for name in names] for names in (found.norms, found.apart))
    try:
        with under_eager(model), _Softer():
            features = probe(model, module, parts[found.output], found.heads, norms, apart)
    except (UnsupportedModelError, RuntimeError, ValueError):
        return None
    return features if _are_apart(features) else None


def _are_apart(features: list[HeadFeatures]) -> bool:
    """Whether queries are each head's own, and no feature plays two roles."""
    queries = [{(name, at) for name, own in roles["q"].items() for at in own} for roles in features]
    roles = [{(name, at) for head in features for name, own in head[role].items() for at in own} for role in ROLES]
    return (
        sum(map(len, queries)) == len(set().union(*queries))
        and sum(map(len, roles)) == len(set().union(*roles))
        and len({len(own) for own in queries}) == 1
    )


@contextmanager
def under_eager(model: nn.Module) -> Iterator[None]:
    """Runs `model` under eager attention, whose steps are functions of torch that can be seen."""
    before = [(config, config._attn_implementation) for config in transformers_configs(model)]
    try:
        for config, _ in before:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, old in before:
            config._attn_implementation = old


@dataclass
class _Call:
    """One softmax over keys: the modules that were running, outermost first, and its number of heads."""

    running: list[nn.Module]
    heads: int
    after: dict[nn.Module, list[tuple[nn.Module, int]]] = field(default_factory=dict)


class _Softer(TorchFunctionMode):
    """Makes every pattern soft: where one is a choice, nothing depends on queries and keys by differentiation."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in SOFTMAX and args[0].dim() > 2:
            args = (args[0] * 0.1, *args[1:])
        return func(*args, **(kwargs or {}))


class _Watch(TorchFunctionMode):
    """Notes each softmax over keys, and what ran after it in each module around it, with the features that it took."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.names = {module: name for name, module in model.named_modules()}
        self.layers = _numbered(model)
        self.running: list[nn.Module] = []
        self.calls: list[_Call] = []
        self.taken: dict[nn.Module, int] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # [batch, head, query, key], or heads and the one row in one dimension; a sink may be one key more.
        if (
            func in SOFTMAX
            and result.dim() in (3, 4)
            and TOKENS <= result.shape[-2] <= result.shape[-1] <= result.shape[-2] + 1
        ):
            self.calls.append(_Call(list(self.running), result.shape[-3]))
        return result

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(under_eager(self.model))
            for module in self.names:
                stack.callback(module.register_forward_pre_hook(self._enter).remove)
                stack.callback(module.register_forward_hook(self._leave, always_call=True).remove)
            yield

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.running.append(module)
        if args and isinstance(args[0], Tensor):
            self.taken[module] = args[0].shape[-1]
            for call in self.calls:
                for around in call.running:
                    if around in self.running:
                        call.after.setdefault(around, []).append((module, args[0].shape[-1]))

    def _leave(self, *_: object) -> None:
        self.running.pop()

    def attention(self, call: _Call) -> Attention | None:
        """What was found around one softmax; `None` where it is no attention of a decoder layer."""
        inside = next((at for at, module in enumerate(call.running) if module in self.layers), None)
        if inside is None:
            return None
        for module in reversed(call.running[inside:]):
            parts = {part: name for name, part in module.named_modules()}
            after = [(part, width) for part, width in call.after.get(module, ()) if part in parts]
            outermost = _outermost([name for part, name in parts.items() if _is_linear(part) and not _is_gate(name)])
            linear = [(part, width) for part, width in after if parts[part] in outermost]
            if linear and module in self.names:
                output, width = linear[-1]
                between = after[: after.index((output, width))]
                before = [part for part, taken in between if _is_norm(part) and taken == width]
                return self._described(call, module, parts, before[0] if before else output, width, inside)
        return None

    def _described(
        self, call: _Call, module: nn.Module, parts: dict[nn.Module, str], output: nn.Module, width: int, inside: int
    ) -> Attention:
        head_dim = width // call.heads
        norms = [part for part in parts if _is_norm(part) and part is not output and part in self.taken]
        wide = [part for part in norms if self.taken[part] > head_dim]
        return Attention(
            layer=self.layers[call.running[inside]],
            name=self.names[module],
            output=parts[output],
            heads=call.heads,
            norms=tuple(parts[part] for part in wide),
            apart=tuple(name for part, name in parts.items() if _is_gate(name) or (part in norms and part not in wide)),
        )


def _numbered(model: nn.Module) -> dict[nn.Module, int]:
    """Each layer's number in its list; lists in sisters of one class (the two stacks of HRM) are counted on."""
    numbers: dict[nn.Module, int] = {}
    for parent in model.modules():
        counted: Counter[tuple[type, str]] = Counter()
        for child in () if isinstance(parent, nn.ModuleList) else parent.children():
            for name, part in child.named_children():
                if isinstance(part, nn.ModuleList):
                    start = counted[type(child), name]
                    numbers |= {layer: start + at for at, layer in enumerate(part)}
                    counted[type(child), name] += len(part)
        for part in parent.children():
            if isinstance(part, nn.ModuleList):
                numbers = {layer: at for at, layer in enumerate(part)} | numbers
    return numbers


def _is_gate(path: str) -> bool:
    """Whether a part of an attention module is a gate, or is in one: a gate may be wrapped by an adapter."""
    return any(name in GATES for name in path.split("."))


def _outermost(paths: Sequence[str]) -> set[str]:
    """Those of some paths that are in no other one: an adapter holds the linear layer that it adapts."""
    return {path for path in paths if not any(path.startswith(f"{other}.") for other in paths)}


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and not _is_norm(module)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not list(module.children())
