"""The attention layers of any model as the judge sees them: by heart in families that it knows, found out elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from freeze_core.attention.probe import HeadFeatures
from pytest_circuitfreeze.suites.judge import anatomy
from pytest_circuitfreeze.suites.judge.anatomy import ROLES, CannotJudge, Role, Site
from pytest_circuitfreeze.suites.judge.discovery import Attention, attention_of, features_of
from pytest_circuitfreeze.suites.tolerance import original
from pytest_circuitfreeze.wrapped import config_of

__all__ = [
    "AnySite",
    "FoundSite",
    "Part",
    "as_found",
    "implementations",
    "made_by",
    "patch_on",
    "projections",
    "seen_at_the_ends",
    "sites",
    "tied",
]


@dataclass(frozen=True, eq=False)
class Part:
    """What the heads of one role are made of in the output of one linear layer or norm.

    Args:
        role: whose.
        place: the layer's path in the attention module.
        features: `[head, feature]`, one row for each set of features, in the order of the first query head that reads
            it; as many rows as the role has heads, or one where all share it.
        readers: the query heads that read each row.
    """

    role: Role
    place: str
    features: Tensor
    readers: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class FoundSite:
    """One attention layer whose storage was found by differentiation.

    Args:
        layer: index of the decoder layer.
        layers: number of decoder layers.
        name: path of the attention module in the model.
        module: the attention module.
        output_name, output: what takes z: the output projection, or a norm over all heads before it.
        heads: query heads.
        group: query heads that read one KV head.
        parts: what q, k and v are made of, by a name of their own.
    """

    layer: int
    layers: int
    name: str
    module: nn.Module
    output_name: str
    output: nn.Module
    heads: int
    group: int
    parts: dict[str, Part]

    def parts_of(self, role: Role) -> list[str]:
        """The parts of one role."""
        return [name for name, part in self.parts.items() if part.role == role]

    def place(self, name: str) -> nn.Module:
        """The linear layer or norm whose output holds a part."""
        return self.module.get_submodule(self.parts[name].place)

    def read_at(self, name: str) -> nn.Module:
        """The outermost module that hands on what `place` gives: a linear layer may be wrapped, and frozen there."""
        path = self.parts[name].place
        while "." in path and len(list(self.module.get_submodule(path.rpartition(".")[0]).children())) == 1:
            path = path.rpartition(".")[0]
        return self.module.get_submodule(path)


AnySite = Site | FoundSite

_AT_THE_ENDS: ContextVar[bool] = ContextVar("seen at the ends of the attention alone", default=False)
_FOUND: WeakKeyDictionary[nn.Module, dict[int, FoundSite]] = WeakKeyDictionary()


def sites(model: PreTrainedModel) -> dict[int, AnySite]:
    """The attention layers of `model` by decoder layer. Ask before a freeze: a freeze may change attributes.

    Raises:
        CannotJudge: none can be told, by heart or by differentiation.
    """
    return dict(as_found(model)) if _AT_THE_ENDS.get() else _known(model)


@contextmanager
def seen_at_the_ends() -> Iterator[None]:
    """Describes no layer by heart for the length of the block: for an engine that runs an attention of its own."""
    token = _AT_THE_ENDS.set(True)
    try:
        yield
    finally:
        _AT_THE_ENDS.reset(token)


def _known(model: PreTrainedModel) -> dict[int, AnySite]:
    if anatomy.is_known(model):
        by_heart = anatomy.sites(model)
        # A copy that is off by rounding has hooks of ours on its projections, and is looked at as the model is.
        if all(anatomy.are_plain(site) for site in anatomy.sites(original(model) or model).values()):
            return dict(by_heart)
        names = {module: name for name, module in model.named_modules()}
        return {layer: _by_place(site, names[site.module]) for layer, site in by_heart.items()}
    if model not in _FOUND:
        source = original(model)
        _FOUND[model] = _find(model) if source is None else _moved(_known(source), model)
    return dict(_FOUND[model])


def as_found(model: PreTrainedModel) -> dict[int, FoundSite]:
    """The same layers, those that are known by heart described as the others are: seen at the ends of the attention.

    That is enough to record, and to run the attention again, however often it ran.
    """
    names = {module: name for name, module in model.named_modules()}
    return {
        layer: site if isinstance(site, FoundSite) else _by_place(site, names[site.module])
        for layer, site in _known(model).items()
    }


def patch_on(known: Mapping[int, AnySite], model: nn.Module, other: nn.Module) -> dict[int, AnySite]:
    """The sites of `model` in another one that runs in its place, with modules at the same paths."""
    names = {module: name for name, module in model.named_modules()}
    moved: dict[int, AnySite] = {}
    for layer, site in known.items():
        module = other.get_submodule(names[site.module])
        if isinstance(site, FoundSite):
            moved[layer] = replace(site, module=module, output=module.get_submodule(site.output_name))
        else:
            moved[layer] = replace(site, module=module)
    return moved


def _by_place(site: Site, name: str) -> FoundSite:
    parts = {}
    for role, (place, features) in site.places().items():
        each = site.heads // len(features)
        readers = tuple(tuple(range(head * each, (head + 1) * each)) for head in range(len(features)))
        parts[str(role)] = Part(role, place, features, readers)
    return FoundSite(
        layer=site.layer,
        layers=site.layers,
        name=name,
        module=site.module,
        output_name=site.family.output,
        output=site.output,
        heads=site.heads,
        group=site.group,
        parts=parts,
    )


def projections(site: AnySite) -> dict[str, nn.Module]:
    """The modules in whose outputs q, k and v are, by their paths in the attention module."""
    if isinstance(site, FoundSite):
        places = [part.place for part in site.parts.values()]
    else:
        places = [place for place, _ in site.places().values()]
    return {place: site.module.get_submodule(place) for place in places}


def implementations(model: PreTrainedModel) -> tuple[str, ...]:
    """The attention implementations, of `sdpa` and `eager`, that the model's class has; the one to run first.

    Where an engine attends by itself, that is compared with eager attention.
    """
    several = any(getattr(module, "_supports_sdpa", False) for module in model.modules()) and not _AT_THE_ENDS.get()
    return ("sdpa", "eager") if several else ("eager",)


def made_by(place: nn.Module) -> Tensor:
    """The weight of a linear layer or norm with one row for each feature of its output, as a view without gradient."""
    weight = cast(Tensor, place.weight)
    # An adapter gives the weight of the layer that it adapts.
    owner = next((module for module in place.modules() if module._parameters.get("weight") is weight), place)
    return weight.detach().T if hasattr(owner, "nf") else weight.detach()  # transformers' Conv1D keeps [in, out]


def tied(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that several modules use: what is seen of them is not one layer's doing."""
    named = Counter(parameter for _, parameter in model.named_parameters(remove_duplicate=False))
    return {parameter for parameter, names in named.items() if names > 1}


def _find(model: PreTrainedModel) -> dict[int, FoundSite]:
    with torch.random.fork_rng(devices=[]):
        attention = attention_of(model)
        told = [(one, features_of(model, one)) for one in attention]
    found: dict[int, FoundSite] = {}
    for one, features in told:
        # Two in one layer: neither is the layer's attention.
        if features is not None and sum(other.layer == one.layer for other in attention) == 1:
            site = _site(model, one, features)
            if site is not None:
                found[one.layer] = site
    if not found:
        raise CannotJudge(
            f"no layer of {type(model).__name__} has an attention whose queries, keys and values can be told apart"
        )
    return found


def _moved(found: Mapping[int, AnySite], model: PreTrainedModel) -> dict[int, FoundSite]:
    """The sites of a model in a copy of it, whose own gradients tell less."""
    moved = {}
    for layer, site in found.items():
        if isinstance(site, FoundSite):
            module = model.get_submodule(site.name)
            moved[layer] = replace(site, module=module, output=module.get_submodule(site.output_name))
    return moved


def _site(model: PreTrainedModel, found: Attention, features: list[HeadFeatures]) -> FoundSite | None:
    module = model.get_submodule(found.name)
    values = [tuple(sorted((place, *sorted(own)) for place, own in head["v"].items())) for head in features]
    kv_heads = len(set(values))
    group = found.heads // kv_heads
    if any(values[head] != values[head // group * group] for head in range(found.heads)):
        return None
    parts: dict[str, Part] = {}
    for role in ROLES:
        places = {place for head in features for place in head[role]}
        for place in sorted(places):
            name = role if len(places) == 1 else f"{role} in {place}"
            parts[name] = _part(role, place, [head[role].get(place, frozenset()) for head in features])
    if any(len(part.features) == 0 for part in parts.values()):
        return None
    config: Any = config_of(model).get_text_config(decoder=True)
    return FoundSite(
        layer=found.layer,
        layers=int(config.num_hidden_layers),
        name=found.name,
        module=module,
        output_name=found.output,
        output=module.get_submodule(found.output),
        heads=found.heads,
        group=group,
        parts=parts,
    )


def _part(role: Role, place: str, own: list[frozenset[int]]) -> Part:
    distinct = list(dict.fromkeys(own))
    if len({len(one) for one in distinct}) > 1:
        return Part(role, place, torch.empty(0, 0, dtype=torch.long), ())
    readers = tuple(tuple(head for head, each in enumerate(own) if each == one) for one in distinct)
    return Part(role, place, torch.tensor([sorted(one) for one in distinct]), readers)
