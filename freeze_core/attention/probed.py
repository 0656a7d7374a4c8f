"""Layouts of attention that neither tables nor names know: found by differentiation, or refused with the reason.

The model runs once, on two tokens, to see what such attention is called with. From there a copy of the one module is
looked at, so that the model is left as it is.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import combinations
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from freeze_core.attention.classes import is_called_attention
from freeze_core.attention.layout import Layout, Part, Storage, plain_layout
from freeze_core.attention.probe import HeadFeatures, is_linear, probe
from freeze_core.attention.storages import unshared_projections, width_in, width_of
from freeze_core.errors import UnsupportedModelError
from freeze_core.vocabulary import ModelArchitecture, Role

__all__ = ["left_alone", "may_attend", "probed_layouts"]

HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
"""What attention modules, or their configs, call the number of query heads."""


class _Facts(NamedTuple):
    """What was found in one attention module: paths within it, and for each role `[heads, features]`."""

    heads: int
    output: str
    projections: Mapping[Role, str]
    features: Mapping[Role, Tensor]


_KNOWN: WeakKeyDictionary[nn.Module, _Facts] = WeakKeyDictionary()


def may_attend(module: nn.Module) -> bool:
    """Whether a module of a class that is not known seems to be attention: by its name, and linear layers in it."""
    return is_called_attention(module) and sum(map(is_linear, module.modules())) > 1


def probed_layouts(model: nn.Module, attentions: Sequence[nn.Module]) -> dict[nn.Module, Layout | str]:
    """The layout of each of `attentions`, or why it cannot be told."""
    fresh = [attention for attention in attentions if attention not in _KNOWN]
    calls: Mapping[nn.Module, _Call] = {}
    failed = ""
    if fresh:
        try:
            calls = _calls(model, fresh)
        except Exception as error:  # whatever a model raises over two tokens
            failed = f"{type(model).__name__} does not run on two tokens alone, {type(error).__name__}: {error}"
    layouts: dict[nn.Module, Layout | str] = {}
    for attention in attentions:
        try:
            if attention not in _KNOWN:
                if attention not in calls:
                    raise UnsupportedModelError(failed or "it does not run when the model is given two tokens")
                with torch.inference_mode(False), torch.enable_grad():  # whatever mode the freeze is asked for in
                    _KNOWN[attention] = _facts(attention, calls[attention])
            layouts[attention] = _layout(attention, _KNOWN[attention])
        except UnsupportedModelError as error:
            layouts[attention] = (
                f"neither names nor tables tell where {type(attention).__name__} keeps queries, keys and values, and "
                f"probing it does not either: {error}"
            )
    return layouts


class _Call(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _calls(model: nn.Module, attentions: Sequence[nn.Module]) -> dict[nn.Module, _Call]:
    """What each of `attentions` is called with when the model is run on two tokens."""
    calls: dict[nn.Module, _Call] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(module, _Call(args, dict(kwargs)))

    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    ids = torch.ones(1, 2, dtype=torch.long, device=device)
    parameters = inspect.signature(type(model).forward).parameters
    with ExitStack() as stack:
        stack.enter_context(left_alone(model))
        for attention in attentions:
            stack.callback(attention.register_forward_pre_hook(keep, with_kwargs=True).remove)
        options = {"use_cache": False} if "use_cache" in parameters else {}
        model(input_ids=ids, **options) if "input_ids" in parameters else model(ids, **options)
    return calls


@contextmanager
def left_alone(model: nn.Module) -> Iterator[None]:
    """Runs the model without dropout, and puts back its flags, attributes and buffers and torch's generators."""
    # What a module makes on the way, such as a mask for two tokens, is no part of the model.
    kept = [(own, dict(own)) for module in model.modules() for own in (vars(module), module._buffers)]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            for module in model.modules():
                module.training = False
            yield
        finally:
            for own, were in kept:
                own.clear()
                own.update(were)
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


class _Alone(nn.Module):
    """A copy of one attention module, called as the model called it, on hidden states that are drawn anew each time."""

    def __init__(self, attention: nn.Module, call: _Call) -> None:
        super().__init__()
        self.attention = copy.deepcopy(attention).eval()
        self.dtype = torch.float32
        if any(parameter.dtype == torch.float64 for parameter in attention.parameters()):
            self.dtype = torch.float64
        self.attention.to(self.dtype)
        given = (call.kwargs.get("hidden_states"), *call.args, *call.kwargs.values())
        hidden = next((one for one in given if isinstance(one, Tensor) and one.dim() == 3 and one.shape[1] == 2), None)
        if hidden is None:
            raise UnsupportedModelError("it is not given hidden states [batch, token, feature]")
        self.hidden, self.call = hidden, call
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        drawn = torch.randn(self.hidden.shape, generator=self.generator, dtype=torch.float64).to(self.hidden.device)
        args = tuple(self._own(one, drawn) for one in self.call.args)
        kwargs = {name: self._own(one, drawn) for name, one in self.call.kwargs.items()}
        return self.attention(*args, **kwargs)

    def _own(self, value: Any, drawn: Tensor) -> Any:
        if value is self.hidden:
            return drawn.to(self.dtype)
        if isinstance(value, Tensor):
            return value.detach().to(self.dtype if value.is_floating_point() else value.dtype, copy=True)
        if isinstance(value, tuple | list):
            return type(value)(self._own(one, drawn) for one in value)
        return None if hasattr(value, "get_seq_length") else value  # a cache would grow

    def order(self) -> list[tuple[str, Sequence[int]]]:
        """The linear layers of the attention in the order in which they ran, by path, with the shape that each gave."""
        ran: list[tuple[str, Sequence[int]]] = []
        with ExitStack() as stack, torch.no_grad():
            for name, module in self.attention.named_modules():
                if is_linear(module):
                    hook = module.register_forward_hook(lambda _, __, y, name=name: ran.append((name, list(y.shape))))
                    stack.callback(hook.remove)
            self(torch.empty(0), use_cache=False)
        return ran


def _facts(attention: nn.Module, call: _Call) -> _Facts:
    """What a copy of `attention` shows under differentiation.

    Raises:
        UnsupportedModelError: it does not tell its heads, or some of their features play no role, or several.
    """
    heads = _heads(attention)
    for name, module in attention.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() > 2:
            raise UnsupportedModelError(f"{name} is a {type(module).__name__}, which may mix tokens before attention")
    try:
        alone = _Alone(attention, call)
        ran = alone.order()
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever the copy of a module raises
        raise UnsupportedModelError(f"a copy of it does not run, {type(error).__name__}: {error}") from error
    reason = "no linear layer of it runs"
    shapes = dict(ran)
    for output, _ in reversed(ran):  # the output projection is the last, unless something is made to gate what it gives
        try:
            found = probe(alone, alone.attention, alone.attention.get_submodule(output), heads)
            facts = _told(heads, output, found)
        except (UnsupportedModelError, RuntimeError) as error:
            reason = str(error) if output == ran[-1][0] else reason
            continue
        _refuse_other_order({name: shapes[name] for name in (*facts.projections.values(), output)})
        _refuse_finer_heads(alone, facts)
        return facts
    raise UnsupportedModelError(reason)


def _refuse_other_order(shapes: Mapping[str, Sequence[int]]) -> None:
    """Raises `UnsupportedModelError` where the activation of two tokens is not `[1, 2, feature]`."""
    for name, shape in shapes.items():
        if shape[:-1] != [1, 2]:
            raise UnsupportedModelError(
                f"its {name} gives {shape} for one row of two tokens, where [batch, token, feature] was expected, so "
                "that rows could not be told from tokens"
            )


def _refuse_finer_heads(alone: _Alone, facts: _Facts) -> None:
    """Raises `UnsupportedModelError` where parts of a head's z have queries of their own: they are heads themselves."""
    output, size = alone.attention.get_submodule(facts.output), facts.features["v"].shape[1]
    for parts in (2, 3, 5, 7):
        if size % parts or size == parts:
            continue
        try:
            finer = probe(alone, alone.attention, output, facts.heads * parts)
        except UnsupportedModelError:  # a part that passes nothing on is no head
            continue
        queries = [{(name, one) for name, own in head["q"].items() for one in own} for head in finer]
        for start in range(0, len(queries), parts):
            if any(one.isdisjoint(other) for one, other in combinations(queries[start : start + parts], 2)):
                raise UnsupportedModelError(
                    f"it says that it has {facts.heads} heads, and head {start // parts} has parts with a query each, "
                    "so that it is several"
                )


def _heads(attention: nn.Module) -> int:
    for owner in (attention, getattr(attention, "config", None)):
        for name in HEADS:
            value = getattr(owner, name, None)
            if isinstance(value, int) and value > 0:
                return value
    raise UnsupportedModelError(f"it does not say how many heads it has: it has none of {', '.join(HEADS)}")


def _told(heads: int, output: str, found: list[HeadFeatures]) -> _Facts:
    """The features of each head of its own, in their order.

    Raises:
        UnsupportedModelError: they are no whole heads, each of one role.
    """
    projections: dict[Role, str] = {}
    features: dict[Role, Tensor] = {}
    roles: tuple[Role, ...] = ("q", "k", "v")
    for role in roles:
        places = {name for head in found for name in head[role]}
        if len(places) > 1:
            raise UnsupportedModelError(f"its {role} is made of features of {' and '.join(sorted(places))}")
        projections[role] = places.pop()
        by_head = [tuple(sorted(head[role][projections[role]])) for head in found]
        own = list(dict.fromkeys(by_head))
        group = heads // len(own)
        if [own[head // group] for head in range(len(own) * group)] != by_head:
            raise UnsupportedModelError(f"its heads share the features of its {role} otherwise than in groups")
        if len({len(one) for one in own}) > 1 or len({one for head in own for one in head}) < sum(map(len, own)):
            raise UnsupportedModelError(f"the features of its {role} are not apart by heads")
        features[role] = torch.tensor(own)
    if len(features["q"]) != heads or len(features["k"]) != len(features["v"]):
        counts = ", ".join(f"{len(index)} of {role}" for role, index in features.items())
        raise UnsupportedModelError(
            f"of its {heads} heads not each has a query of its own, or keys and values are not shared alike: features "
            f"are apart by {counts} (a norm over all heads, say, lets each of them depend on all)"
        )
    _refuse_overlap(projections, features)
    return _Facts(heads, output, projections, features)


def _refuse_overlap(projections: Mapping[Role, str], features: Mapping[Role, Tensor]) -> None:
    """Raises `UnsupportedModelError` where a feature plays two roles: the probe gives it to one, so sizes differ."""
    taken = [(projections[role], feature) for role, index in features.items() for feature in index.flatten().tolist()]
    if features["q"].shape[1] != features["k"].shape[1] or len(set(taken)) < len(taken):
        sizes = " and ".join(f"{features[role].shape[1]} of {role}" for role in ("q", "k"))
        raise UnsupportedModelError(f"its roles overlap: a head has {sizes} for itself, where they are as many")


def _layout(attention: nn.Module, facts: _Facts) -> Layout:
    modules = {name: attention.get_submodule(name) for name in dict.fromkeys(facts.projections.values())}
    widths = {name: width_of(module) for name, module in modules.items()}
    heads, kv_heads = facts.heads, len(facts.features["k"])
    output = attention.get_submodule(facts.output)
    value_dim = facts.features["v"].shape[1]
    if width_in(output) != heads * value_dim:
        raise UnsupportedModelError(
            f"its {facts.output} takes {width_in(output)} features, but {heads} heads of {value_dim} make "
            f"{heads * value_dim}"
        )
    shared = Storage(
        modules, widths, {role: (Part(facts.projections[role], index),) for role, index in facts.features.items()}
    )
    plain = all(
        torch.equal(facts.features[role], plain_layout(kv_heads, facts.features[role].shape[1])) for role in ("k", "v")
    )
    unshared = unshared_projections(attention, shared, heads) if plain and len(modules) == 3 else None
    stored = ModelArchitecture.SEPARATE_QKV if len(modules) == 3 else ModelArchitecture.FUSED_QKV
    head_dim = facts.features["q"].shape[1]
    return Layout(stored, heads, kv_heads, head_dim, output, attention, shared, unshared)
