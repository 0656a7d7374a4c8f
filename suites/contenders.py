"""The same freeze by several hands: the engine under test, the tightest hooks by hand, each installed peer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from freeze_core import InterventionConfig
from pytest_circuitfreeze.adapters.places import Layer, layers
from pytest_circuitfreeze.engines import BUILT_IN, Engine, EngineError, load_engine

IN_PLACE, ON_A_COPY = "hook by hand", "hook by hand, on a copy"
BY_HAND = (IN_PLACE, ON_A_COPY)
Model = TypeVar("Model", bound=nn.Module)
ROLES = {"qk": "qk", "ov": "v"}
Freeze = Callable[[], AbstractContextManager[Callable[..., Any]]]


def contenders(
    engine: Engine, model: nn.Module, config: InterventionConfig
) -> tuple[dict[str, Freeze], dict[str, str]]:
    """Who can freeze a model as `config`, a `zero` at full strength, by name; and why a peer is not among them.

    The engine and the hooks freeze `model` itself. A peer is given a twin of it, since some leave theirs changed.
    """
    found: dict[str, Freeze] = {
        engine.name: partial(engine.freeze, model, config),
        IN_PLACE: partial(hooked_by_hand, model, config, in_place=True),
        ON_A_COPY: partial(hooked_by_hand, model, config, in_place=False),
    }
    missing: dict[str, str] = {}
    for name in BUILT_IN:
        if name in (engine.name, "hooks"):
            continue
        try:
            found[name] = partial(load_engine(name).freeze, twin(model), config)
        except EngineError as error:
            missing[name] = str(error)
    return found, missing


def twin(model: Model) -> Model:
    """Another model with the very same parameters and buffers: modules of its own, no weights."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def demand_alike(freezes: Mapping[str, Freeze], plain: Callable[..., Any], ids: Tensor) -> None:
    """Compares each one's logits with the first one's.

    Raises:
        AssertionError: they differ by more than rounding, so that one freezes something else, or nothing.
    """
    unfrozen = plain(input_ids=ids).logits
    logits = {}
    for name, freeze in freezes.items():
        with freeze() as call:
            logits[name] = call(input_ids=ids).logits
    wanted = next(iter(logits.values()))
    effect = float((wanted - unfrozen).abs().max())
    for name, own in logits.items():
        difference = float((own - wanted).abs().max())
        assert difference < 1e-2 * effect, f"{name}: logits off by {difference:.2g}, where the effect is {effect:.2g}"


@contextmanager
def hooked_by_hand(model: nn.Module, config: InterventionConfig, *, in_place: bool) -> Iterator[nn.Module]:
    """Forward hooks that put zeros where `config` wants them, as tight as can be."""
    chosen = config.layer_indices or range(len(layers(model)))
    handles = [
        layer.module.get_submodule(name).register_forward_hook(_zeroing(parts, in_place))
        for layer in layers(model)
        if layer.number in chosen
        for name, parts in slices(layer, config).items()
    ]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _zeroing(parts: Sequence[Any], in_place: bool) -> Callable[..., Tensor | None]:
    def on_a_copy(module: nn.Module, given: object, output: Tensor) -> Tensor:
        output = output.clone()
        for part in parts:
            output[part] = 0
        return output

    def hook(module: nn.Module, given: object, output: Tensor) -> None:
        for part in parts:
            output[part] = 0

    return hook if in_place else on_a_copy


def slices(layer: Layer, config: InterventionConfig) -> dict[str, list[Any]]:
    """By projection of a layer: indices of the stretches of features that a freeze of scope `group` holds."""
    sharing = layer.heads // layer.kv_heads
    wanted: dict[str, list[int]] = {}
    for role in ROLES[str(config.circuit)]:
        name, features = layer.places[role]
        heads = config.head_indices or range(layer.heads)
        own = sorted({head if role == "q" else head // sharing for head in heads})
        wanted.setdefault(name, []).extend(features[own].flatten().tolist())
    return {name: [(..., slice(start, stop)) for start, stop in stretches(of)] for name, of in wanted.items()}


def stretches(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Sorted numbers as ranges without gaps, each from its start to before its stop."""
    ordered = torch.tensor(sorted(numbers))
    cuts = (ordered.diff() != 1).nonzero().flatten() + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in ordered.tensor_split(cuts.tolist())]
