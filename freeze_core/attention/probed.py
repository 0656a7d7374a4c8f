"""Layouts of attention whose code is not transformers' own: found by differentiation, or refused with the reason.

Tables and names say where transformers' own classes keep their heads. For any other class they are a guess, and a wrong
guess would freeze other heads than those asked for. The model runs once, on two tokens, to see what such attention is
called with. From there the attention alone is run, with draws in the place of what its linear layers give. Where the
probe confirms what the names say, that is used; where they differ, what the probe found is used.

The module itself is run, not a copy: it may be offloaded, quantised, or have a forward that is bound to it.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from freeze_core.attention.classes import (
    attention_functions,
    class_functions,
    class_values,
    instance_forward,
    instance_methods,
    is_called_attention,
)
from freeze_core.attention.layout import Layout, Part, Storage, plain_layout
from freeze_core.attention.probe import HeadFeatures, is_linear, probe
from freeze_core.attention.storages import unshared_projections, width_in
from freeze_core.errors import UnsupportedModelError
from freeze_core.forward_patch import patches_on
from freeze_core.vocabulary import ModelArchitecture, Role

__all__ = ["ProbeFailedError", "is_covered", "left_alone", "may_attend", "probed_layouts", "was_probed"]

HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
"""What attention modules, or their configs, call the number of query heads."""

LAYER_NUMBERS = ("layer_idx", "layer_id", "layer_index", "layer_number", "layer_num", "block_idx", "idx")
"""What attention modules call their number: no difference between two layers of one model."""

FRAMEWORKS = ("torch", "transformers", "accelerate", "peft", "deepspeed", "optimum", "compressed_tensors", "torchao")
"""Libraries whose hooks a module may need to run at all; hooks of others see no probe."""


class ProbeFailedError(UnsupportedModelError):
    """A probe that could not be run, so that it says nothing: whoever knows the storage may state it."""


class _Facts(NamedTuple):
    """What was found in one attention module.

    Args:
        heads: query heads.
        named: whether it is what names or tables say; then there are no features here.
        per_head: whether its code reads keys and values of each query head's own, where it is told to.
        output: path of the output projection in the module.
        projections: path by role.
        features: by role `[heads, features]`.
        widths: features that each projection gives, by path.
    """

    heads: int
    named: bool
    per_head: bool
    output: str
    projections: Mapping[Role, str]
    features: Mapping[Role, Tensor]
    widths: Mapping[str, int]


class _Known(NamedTuple):
    """What was found in a module, and its code, sizes and attributes by then: it holds for as long as these do."""

    state: tuple[Any, ...]
    facts: _Facts


_KNOWN: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()
_OF_CLASS: WeakKeyDictionary[type, dict[tuple[Any, ...], _Facts]] = WeakKeyDictionary()
"""For each class what was found, by all that may make its modules differ."""

Hints = Mapping[nn.Module, Layout | str]
"""What names and tables say of an attention module, or why they do not."""


def may_attend(module: nn.Module) -> bool:
    """Whether a module of a class that is not known seems to be attention: by its name, and linear layers in it."""
    return is_called_attention(module) and sum(map(is_linear, module.modules())) > 1


def was_probed(attention: nn.Module) -> bool:
    """Whether a probe has found the layout of this very module before."""
    return attention in _KNOWN


def is_covered(attention: nn.Module) -> bool:
    """Whether projections of an attention are frozen; asked of one whose own forward is no freeze's any more.

    A probe would run into the freeze. Whoever installs another one is told that something was put on top.
    """
    return any(patches_on(part) for part in attention.modules())


def probed_layouts(
    model: nn.Module, attentions: Sequence[nn.Module], hints: Hints
) -> dict[nn.Module, Layout | UnsupportedModelError]:
    """The layout of each of `attentions`, or why it cannot be told."""
    fresh: dict[Any, list[nn.Module]] = {}
    states: dict[nn.Module, tuple[Any, ...]] = {}
    for attention in attentions:
        details = _details(attention)
        states[attention] = (*_state(attention), details)
        if attention not in _KNOWN or (_KNOWN[attention].state != states[attention] and not is_covered(attention)):
            key = None if details is None else states[attention]
            facts = None if key is None else _OF_CLASS.get(type(attention), {}).get(key)
            if facts is None:
                fresh.setdefault(key or attention, []).append(attention)
            else:
                _KNOWN[attention] = _Known(states[attention], facts)
    errors: dict[nn.Module, UnsupportedModelError] = {}
    calls, failure = _calls(model, list(fresh.values())) if fresh else ({}, "")
    for key, alike in fresh.items():
        try:
            first = next((one for one in alike if one in calls), alike[0])
            call = calls.get(first) or _direct_call(first, failure)
            with torch.inference_mode(False):  # whatever mode the freeze is asked for in
                facts = _facts(first, call, hints[first])
        except UnsupportedModelError as error:
            errors |= dict.fromkeys(alike, error)
            continue
        if key is not first:
            _OF_CLASS.setdefault(type(first), {})[key] = facts
        for one in alike:
            _KNOWN[one] = _Known(states[one], facts)
    layouts: dict[nn.Module, Layout | UnsupportedModelError] = {}
    for attention in attentions:
        try:
            if attention in errors:
                raise errors[attention]
            layouts[attention] = _layout(attention, _KNOWN[attention].facts, hints[attention])
        except UnsupportedModelError as error:
            layouts[attention] = _explained(attention, hints[attention], error)
    return layouts


def _explained(attention: nn.Module, hint: Layout | str, error: UnsupportedModelError) -> UnsupportedModelError:
    name = type(attention).__name__
    if isinstance(hint, str):
        by_names = f" (by its names: {hint})" if hint else ""
        return type(error)(
            f"neither names nor tables tell where {name} keeps queries, keys and values{by_names}, and probing it does "
            f"not either: {error}"
        )
    said = f"{hint.heads} query and {hint.kv_heads} KV heads in {', '.join(hint.shared.modules)}"
    if isinstance(error, ProbeFailedError):
        return ProbeFailedError(
            f"{name} runs code that is not transformers' own. Its names say {said}, which cannot be verified: {error}. "
            f"If the names are right, say so with architecture={str(hint.architecture)!r}; or call get_model_config of "
            "a model of this class and these sizes where it can be run, before this one is frozen"
        )
    return UnsupportedModelError(
        f"{name} runs code that is not transformers' own. Its names say {said}; a probe found that this is wrong, and "
        f"what it found is not supported: {error}"
    )


def _state(attention: nn.Module) -> tuple[Any, ...]:
    """The code that an attention runs and its head counts."""
    heads = tuple(vars(attention).get(name) for name in HEADS if isinstance(vars(attention).get(name), int))
    children = tuple(
        (name, weakref.ref(type(child)), width_in(child), tuple(map(weakref.ref, class_functions(type(child)))))
        for name, child in attention._modules.items()
        if child is not None
    )
    # Deeper than its methods: what a function or a kernel calls may be replaced between two freezes.
    functions = tuple(map(_identity, attention_functions(attention)))
    methods = tuple((name, _identity(function)) for name, function in instance_methods(attention))
    return (functions, methods, _identity(instance_forward(attention)), heads, children)


def _identity(function: Any) -> Any:
    """What tells callables apart without keeping them, and what they are bound to, alive."""
    if function is None:
        return None
    bound = getattr(function, "__self__", None)
    try:
        return weakref.ref(getattr(function, "__func__", function)), id(bound)
    except TypeError:
        return id(function)


def _details(attention: nn.Module) -> tuple[Any, ...] | None:
    """All that may make two attention modules of one class differ, beside their number; `None` where that is unsure.

    And what may make one differ from what it was: plain attributes of its class among it.
    """
    details: list[Any] = [tuple(class_values(type(attention)))]
    try:
        for path, module in attention.named_modules():
            own = {name: value for name, value in vars(module).items() if name not in _TORCH_ATTRIBUTES}
            config = own.pop("config", None)
            shapes = [(name, tuple(parameter.shape)) for name, parameter in module.named_parameters(recurse=False)]
            details.append((path, weakref.ref(type(module)), str(shapes)))
            # Tensors may hold an order of heads; what is neither number nor text may be anything.
            if any(buffer is not None for buffer in module._buffers.values()):
                return None
            if module is attention and any(parameter is not None for parameter in module._parameters.values()):
                return None
            if module is attention or not is_linear(module):
                details += [(name, _plain(value)) for name, value in own.items() if name not in LAYER_NUMBERS]
            if config is not None:
                details.append(tuple((name, _plain(value)) for name, value in vars(config).items()))
    except TypeError:  # a value that may be anything
        return None
    return tuple(details)


_TORCH_ATTRIBUTES = frozenset(vars(nn.Module())) | {"forward", "_hf_hook", "_old_forward"}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return value
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))
    if isinstance(value, dict):
        return tuple((str(name), _plain(one)) for name, one in value.items())
    raise TypeError(f"a {type(value).__name__} is neither a number nor text")


class _Call(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _AllSeen(Exception):
    """Ends a run of the model that has shown what it was run for."""


def _calls(model: nn.Module, groups: Sequence[Sequence[nn.Module]]) -> tuple[dict[nn.Module, _Call], str]:
    """What attention modules, some of each group, are called with when the model is run on two tokens; or why not."""
    calls: dict[nn.Module, _Call] = {}
    waiting = {id(group) for group in groups}
    group_of = {attention: id(group) for group in groups for attention in group}
    # What moves weights in and out around each module must not be left halfway.
    whole = any("_hf_hook" in vars(module) or module._forward_pre_hooks for module in model.modules())

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(module, _Call(args, dict(kwargs)))
        waiting.discard(group_of[module])
        if not waiting and not whole:
            raise _AllSeen

    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if device.type == "meta" and not whole:
        return {}, f"{type(model).__name__} is on the meta device, without values"
    ids = torch.ones(1, 2, dtype=torch.long, device="cpu" if device.type == "meta" else device)
    try:
        parameters = inspect.signature(model.forward).parameters
        options: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
        if "decoder_input_ids" in parameters:
            options["decoder_input_ids"] = ids
        with ExitStack() as stack:
            stack.enter_context(left_alone(model))
            stack.enter_context(_unobserved(model))
            for attention in group_of:
                stack.callback(attention.register_forward_pre_hook(keep, with_kwargs=True).remove)
            if "input_ids" in parameters:
                model(input_ids=ids, **options)
            else:
                model(ids, **options)
    except _AllSeen:
        pass
    except Exception as error:  # whatever a model raises over two tokens
        return calls, f"{type(model).__name__} does not run on two tokens alone, {type(error).__name__}: {error}"
    return calls, "it does not run when the model is given two tokens"


def _direct_call(attention: nn.Module, failure: str) -> _Call:
    """A call of the attention with hidden states of two tokens alone, where the model did not show one.

    Raises:
        ProbeFailedError: it takes more than those.
    """
    try:
        inspect.signature(attention.forward).bind(None)
    except TypeError:
        raise ProbeFailedError(failure) from None
    linear = next((module for module in attention.modules() if is_linear(module)), None)
    weight: Any = getattr(linear, "weight", None)
    if linear is None or weight.is_meta or not weight.is_floating_point():
        raise ProbeFailedError(failure)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 2, width_in(linear) or weight.shape[1], generator=generator)
    return _Call((hidden.to(weight),), {})


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
                if not buffer.is_meta and not torch.equal(buffer, before):
                    buffer.copy_(before)


@contextmanager
def _unobserved(model: nn.Module) -> Iterator[None]:
    """Sets aside hooks that are nobody's but a user's, and compiled code; for use within `left_alone`."""
    for module in model.modules():
        own = vars(module)
        own.pop("_compiled_call_impl", None)
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            if own[name]:
                needed = [(number, hook) for number, hook in own[name].items() if _of_a_framework(hook)]
                own[name] = type(own[name])(needed)
    with torch.compiler.set_stance("force_eager"):
        yield


def _of_a_framework(hook: Callable[..., Any]) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "")).partition(".")[0] in FRAMEWORKS


class _Alone(nn.Module):
    """One attention module, called as the model called it."""

    def __init__(self, attention: nn.Module, call: _Call) -> None:
        super().__init__()
        self.attention, self.call = attention, call

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        return self.attention(*map(self._own, self.call.args), **{n: self._own(v) for n, v in self.call.kwargs.items()})

    def _own(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().clone()
        if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
            return type(value)(map(self._own, value))
        return None if hasattr(value, "get_seq_length") else value  # a cache would grow

    def order(self, others: Sequence[nn.Module]) -> list[tuple[str, Tensor]]:
        """The linear layers of the attention, and others, in the order in which they ran: path and output of each."""
        ran: list[tuple[str, Tensor]] = []

        def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                ran.append((name, output))

        with ExitStack() as stack, torch.no_grad():
            for name, module in self.attention.named_modules():
                if is_linear(module) or module in others:
                    stack.callback(module.register_forward_hook(partial(keep, name)).remove)
            self(torch.empty(0), use_cache=False)
        return ran

    def skip_products(self, ran: Sequence[tuple[str, Tensor]]) -> None:
        """Lets linear layers give again what they gave, without computing it; for use within `left_alone`.

        The probe puts draws in the place of it, and products are most of what a run of a large attention costs.
        """
        shapes: dict[str, set[torch.Size]] = {}
        for path, output in ran:
            shapes.setdefault(path, set()).add(output.shape)
        for path, output in ran:
            module = self.attention.get_submodule(path)
            if is_linear(module) and len(shapes[path]) == 1:
                vars(module)["forward"] = lambda *args, output=output, **kwargs: output.clone()


def _facts(attention: nn.Module, call: _Call, hint: Layout | str) -> _Facts:
    """What `attention` shows under differentiation.

    Raises:
        ProbeFailedError: it does not run, or does not tell its heads.
        UnsupportedModelError: some of its heads' features play no role, or several.
    """
    for name, module in attention.named_modules():
        weight = getattr(module, "weight", None)
        if hasattr(weight, "device_mesh"):
            raise ProbeFailedError(f"the weight of {name} is spread over processes, so that each has some heads alone")
        if isinstance(weight, Tensor) and weight.dim() > 2:
            raise ProbeFailedError(f"{name} is a {type(module).__name__}, which may mix tokens before attention")
    named = hint if isinstance(hint, Layout) else None
    paths = {module: name for name, module in attention.named_modules()}
    held = list(named.shared.modules.values()) if named else []
    alone = _Alone(attention, call)
    with left_alone(attention), _unobserved(attention), torch.enable_grad():
        try:
            ran = alone.order(held)
        except Exception as error:  # whatever a module raises
            raise ProbeFailedError(f"it does not run alone, {type(error).__name__}: {error}") from error
        if not ran:
            raise ProbeFailedError("no linear layer of it runs")
        alone.skip_products(ran)
        shapes = {path: list(output.shape) for path, output in ran}
        # The output projection is the last, unless something is made to gate what it gives.
        outputs = [paths[named.output]] if named else []
        outputs += [output for output in dict.fromkeys(path for path, _ in reversed(ran)) if output not in outputs]
        reasons = []
        for heads in _head_counts(attention, named):
            for output in outputs:
                try:
                    found = probe(alone, attention, attention.get_submodule(output), heads, held, drawn=True)
                    facts = _told(heads, output, found, named, paths, shapes)
                except Exception as error:  # whatever a module raises that takes something else for its output
                    reasons.append(str(error))
                    continue
                modules = {paths[module] for module in held} if facts.named else set(facts.projections.values())
                _refuse_other_order({path: shape for path, shape in shapes.items() if path in {*modules, output}})
                _refuse_finer_heads(alone, output, heads, found, held)
                return facts._replace(per_head=_reads_own_heads(attention, call, facts, named, held))
    raise UnsupportedModelError(reasons[0])


def _refuse_other_order(shapes: Mapping[str, Sequence[int]]) -> None:
    """Raises `UnsupportedModelError` where the activation of two tokens is not `[1, 2, feature]`."""
    for name, shape in shapes.items():
        if shape[:-1] not in ([1, 2], [1, 1, 2]):
            raise UnsupportedModelError(
                f"its {name} gives {list(shape)} for one row of two tokens, where [batch, token, feature] was "
                "expected, so that rows could not be told from tokens"
            )


def _refuse_finer_heads(
    alone: _Alone, output: str, heads: int, found: list[HeadFeatures], held: Sequence[nn.Module]
) -> None:
    """Raises `UnsupportedModelError` where parts of a head's z have queries of their own: they are heads themselves."""
    size = sum(len(own) for own in found[0]["v"].values())
    for parts in (2, 3, 5, 7):
        if size % parts or size == parts:
            continue
        try:
            projection = alone.attention.get_submodule(output)
            finer = probe(alone, alone.attention, projection, heads * parts, held, drawn=True, draws=1)
        except UnsupportedModelError:  # a part that passes nothing on is no head
            continue
        queries = [{(name, one) for name, own in head["q"].items() for one in own} for head in finer]
        for start in range(0, len(queries), parts):
            if any(one.isdisjoint(other) for one, other in combinations(queries[start : start + parts], 2)):
                raise UnsupportedModelError(
                    f"it says that it has {heads} heads, and head {start // parts} has parts with a query each, "
                    "so that it is several"
                )


def _head_counts(attention: nn.Module, named: Layout | None) -> list[int]:
    """The numbers of query heads that names say, as attributes and by the sizes of projections."""
    counts = [named.heads] if named else []
    for owner in (attention, getattr(attention, "config", None)):
        values = (getattr(owner, name, None) for name in HEADS)
        counts += [value for value in values if isinstance(value, int) and value > 0 and value not in counts]
    if not counts:
        raise ProbeFailedError(f"it does not say how many heads it has: it has none of {', '.join(HEADS)}")
    return counts


def _reads_own_heads(
    attention: nn.Module, call: _Call, facts: _Facts, named: Layout | None, held: Sequence[nn.Module]
) -> bool:
    """Whether the attention's code reads keys and values of each query head's own, given those and told so."""
    layout = named if named and facts.named else _layout(attention, facts._replace(per_head=True), "")
    per_head = layout.unshared
    if per_head is None:
        return False
    paths = {module: name for name, module in attention.named_modules()}
    before = {name: getattr(layout.core, name) for name in per_head.attributes}
    with ExitStack() as stack:
        for name, source in per_head.sources.items():
            hook = per_head.modules[name].register_forward_hook(
                lambda _, __, y, source=source: y[..., source.to(y.device)]
            )
            stack.callback(hook.remove)
        try:
            for name, value in per_head.attributes.items():
                setattr(layout.core, name, value)
            found = probe(_Alone(attention, call), attention, layout.output, facts.heads, held, drawn=True)
        except Exception:  # whatever a module raises that has no such path
            return False
        finally:
            for name, value in before.items():
                setattr(layout.core, name, value)
    return found == _said(per_head, facts.heads, paths)


def _repeated(source: Tensor, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output[..., source.to(output.device)]


def _said(storage: Storage, heads: int, paths: Mapping[nn.Module, str]) -> list[HeadFeatures]:
    """What a storage says of each query head, as a probe would find it."""
    said: list[HeadFeatures] = []
    for head in range(heads):
        roles: dict[Role, dict[str, frozenset[int]]] = {}
        for role, parts in storage.features.items():
            own = roles.setdefault(role, {})
            for part in parts:
                path, row = paths[storage.modules[part.module]], part.features[head // (heads // len(part.features))]
                own[path] = own.get(path, frozenset()) | frozenset(row.tolist())
        said.append(roles)
    return said


def _told(
    heads: int,
    output: str,
    found: list[HeadFeatures],
    named: Layout | None,
    paths: Mapping[nn.Module, str],
    shapes: Mapping[str, Sequence[int]],
) -> _Facts:
    """The features of each head of its own, in their order.

    Raises:
        UnsupportedModelError: they are no whole heads, each of one role.
    """
    if named and heads == named.heads and output == paths[named.output] and found == _said(named.shared, heads, paths):
        return _Facts(heads, True, False, output, {}, {}, {})
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
            f"are apart by {counts} (a norm over all heads, say, lets each of them depend on all; so do heads whose "
            f"values are not one stretch of what {output} is given)"
        )
    _refuse_overlap(projections, features)
    widths = {path: shapes[path][-1] for path in projections.values()}
    return _Facts(heads, False, False, output, projections, features, widths)


def _refuse_overlap(projections: Mapping[Role, str], features: Mapping[Role, Tensor]) -> None:
    """Raises `UnsupportedModelError` where a feature plays two roles: the probe gives it to one, so sizes differ."""
    taken = [(projections[role], feature) for role, index in features.items() for feature in index.flatten().tolist()]
    if features["q"].shape[1] != features["k"].shape[1] or len(set(taken)) < len(taken):
        sizes = " and ".join(f"{features[role].shape[1]} of {role}" for role in ("q", "k"))
        raise UnsupportedModelError(f"its roles overlap: a head has {sizes} for itself, where they are as many")


def _layout(attention: nn.Module, facts: _Facts, hint: Layout | str) -> Layout:
    if facts.named and isinstance(hint, Layout):
        return hint if facts.per_head else replace(hint, unshared=None)
    modules = {path: attention.get_submodule(path) for path in dict.fromkeys(facts.projections.values())}
    heads, kv_heads = facts.heads, len(facts.features["k"])
    output = attention.get_submodule(facts.output)
    value_dim = facts.features["v"].shape[1]
    if width_in(output) != heads * value_dim:
        raise UnsupportedModelError(
            f"its {facts.output} takes {width_in(output)} features, but {heads} heads of {value_dim} make "
            f"{heads * value_dim}"
        )
    shared = Storage(
        modules, facts.widths, {role: (Part(facts.projections[role], index),) for role, index in facts.features.items()}
    )
    plain = all(
        torch.equal(facts.features[role], plain_layout(kv_heads, facts.features[role].shape[1])) for role in ("k", "v")
    )
    unshared = (
        unshared_projections(attention, shared, heads) if plain and facts.per_head and len(modules) == 3 else None
    )
    stored = ModelArchitecture.SEPARATE_QKV if len(modules) == 3 else ModelArchitecture.FUSED_QKV
    head_dim = facts.features["q"].shape[1]
    return Layout(stored, heads, kv_heads, head_dim, output, attention, shared, unshared)
