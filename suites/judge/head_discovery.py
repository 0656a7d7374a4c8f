"""Finds the attention of a model that the judge knows nothing of, by watching one pass and by changing single features.

Attention is where a softmax over keys is taken. The module around it is the smallest one that goes on to a linear layer
afterwards, its output projection; the softmax says how many heads there are.

Which features of which other linear layer are a head's query, key and value is found by experiment. The attention
module is run by itself on a few tokens, with random numbers in the place of what its linear layers give, and each row
of the batch changes one feature at one token:

- what moves scores that later tokens have with its own token, and no others of theirs, is a key: it decides who looks
  at its token;
- what moves scores of its own token alone is a query: it decides where its token looks;
- what moves z of later tokens while all patterns are held fixed is a value: it is what they get to see;
- what moves z of its own token alone while patterns are held (an output gate) is none of the three, and so is what
  only makes z larger or smaller (the mass that an attention sink takes).

No derivative, no layout and hardly a name enters. What does not come out the same under two draws of all numbers, or
acts as two of these at once, or moves the scores of other heads than it moves z of, is not trusted: such a layer is not
judged. An engine may find heads in its own way; this file shares no code with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.judge.judged_sites import ROLES, CannotJudge, Part, Role, Site
from pytest_circuitfreeze.suites.judge.layer_calls import (
    SOFTMAX,
    Call,
    OutputReached,
    attention_implementation,
    fits_pattern,
)
from pytest_circuitfreeze.wrapped import device_of

__all__ = ["discover_sites"]

GATES = ("gate_proj", "g_proj")
"""Linear layers that may run behind the softmax, beside the output projection."""

TOKENS = 5
CHANGED = 2
"""The token at which features are changed: those behind it can look at it, and it can look at those before it."""

ROWS = 64
"""Rows of an experiment: one in which nothing is changed, and one for each feature that is."""

STEP = 4.0
"""By how much a feature is changed; the numbers in the place of activations are between 0.5 and 1.5, of either sign."""

Features = Mapping[Role, Mapping[str, frozenset[int]]]
"""What one head's query, key and value are made of: features of the outputs of modules, by their paths."""


def discover_sites(model: PreTrainedModel) -> dict[int, Site]:
    """The attention layers of `model`, by decoder layer, whose queries, keys and values can be told apart.

    Raises:
        CannotJudge: there are none.
    """
    found: dict[int, Site] = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad(), attention_implementation(model, "eager"):
        attention = _find_attention(model)
        calls = _keep_calls(model, [model.get_submodule(one.name) for one in attention])
        for one in attention:
            # Two in one layer: neither is the layer's attention.
            if sum(other.number.layer == one.number.layer for other in attention) > 1:
                continue
            module = model.get_submodule(one.name)
            with suppress(CannotJudge, RuntimeError, ValueError):
                found[one.number.layer] = _site(model, one, *_find_features(module, one, calls[module]))
    if not found:
        raise CannotJudge(
            f"no layer of {type(model).__name__} has an attention whose queries, keys and values can be told apart"
        )
    return found


class _Number(NamedTuple):
    """Which one of how many layers."""

    layer: int
    layers: int


@dataclass(frozen=True, eq=False)
class _Attention:
    """One attention module as a pass showed it.

    Args:
        number: of its decoder layer among its siblings.
        name: path of the module in the model.
        output: what takes z, by path in the module: the output projection, or a norm over all heads before it.
        heads: query heads.
        sources: what q, k and v may be read from, by path in the module: linear layers, and norms over all heads.
    """

    number: _Number
    name: str
    output: str
    heads: int
    sources: tuple[str, ...]


def _find_attention(model: PreTrainedModel) -> list[_Attention]:
    """The attention modules of `model`, each of one layer only, found on one pass under eager attention."""
    watch = _Watch(model)
    with watch.watching(), watch:
        model(input_ids=torch.arange(TOKENS, device=device_of(model))[None])
    found: dict[str, _Attention | None] = {}
    for call in watch.calls:
        one = watch.attention(call)
        if one is not None:
            # A module that serves several layers cannot be judged in one of them; a layer may run several times.
            known = found.get(one.name, one)
            found[one.name] = one if known is not None and known.number == one.number else None
    return [one for one in found.values() if one is not None]


@dataclass
class _Softmax:
    """One softmax over keys: the modules that were running, outermost first, and its number of heads."""

    running: list[nn.Module]
    heads: int
    after: dict[nn.Module, list[tuple[nn.Module, int]]] = field(default_factory=dict)


class _Watch(TorchFunctionMode):
    """Notes each softmax over keys, and what ran after it in each module around it, with the features that it took."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {module: name for name, module in model.named_modules()}
        self.layers = _numbered(model)
        self.running: list[nn.Module] = []
        self.calls: list[_Softmax] = []
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
            self.calls.append(_Softmax(list(self.running), result.shape[-3]))
        return result

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
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

    def attention(self, call: _Softmax) -> _Attention | None:
        """What was found around one softmax; `None` where it is no attention of a decoder layer."""
        inside = next((at for at, module in enumerate(call.running) if module in self.layers), None)
        if inside is None:
            return None
        for module in reversed(call.running[inside:]):
            parts = {part: name for name, part in module.named_modules()}
            after = [(part, width) for part, width in call.after.get(module, ()) if part in parts]
            linear = _outermost([name for part, name in parts.items() if _is_linear(part)])
            projected = [(part, width) for part, width in after if parts[part] in linear and not _is_gate(parts[part])]
            if projected and module in self.names:
                output, width = projected[-1]
                between = after[: after.index((output, width))]
                before = [part for part, taken in between if _is_norm(part) and taken == width]
                output = before[0] if before else output
                wide = [
                    name
                    for part, name in parts.items()
                    if _is_norm(part) and part is not output and self.taken.get(part, 0) > width // call.heads
                ]
                return _Attention(
                    number=self.layers[call.running[inside]],
                    name=self.names[module],
                    output=parts[output],
                    heads=call.heads,
                    sources=(*linear, *wide),
                )
        return None


def _numbered(model: nn.Module) -> dict[nn.Module, _Number]:
    """Each layer's number in its list; lists in sisters of one class (the two stacks of HRM) are counted on."""
    numbers: dict[nn.Module, _Number] = {}
    for parent in model.modules():
        sisters: dict[tuple[type, str], list[nn.Module]] = {}
        for child in () if isinstance(parent, nn.ModuleList) else parent.children():
            for name, part in child.named_children():
                if isinstance(part, nn.ModuleList):
                    sisters.setdefault((type(child), name), []).extend(part)
        for layers in sisters.values():
            numbers |= {layer: _Number(at, len(layers)) for at, layer in enumerate(layers)}
        for part in parent.children():
            if isinstance(part, nn.ModuleList):
                numbers = {layer: _Number(at, len(part)) for at, layer in enumerate(part)} | numbers
    return numbers


def _is_gate(path: str) -> bool:
    """Whether a part of an attention module is a gate, or is in one: a gate may be wrapped by an adapter."""
    return any(name in GATES for name in path.split("."))


def _outermost(paths: Sequence[str]) -> list[str]:
    """Those of some paths that are in no other one: an adapter holds the linear layer that it adapts."""
    return [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and not _is_norm(module)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not list(module.children())


def _keep_calls(model: PreTrainedModel, modules: Sequence[nn.Module]) -> dict[nn.Module, Call]:
    """What `modules` are called with in a pass of as many equal rows as an experiment has."""
    calls: dict[nn.Module, Call] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[module] = Call(args, kwargs).held()

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(keep, with_kwargs=True).remove)
        model(**Batch(torch.arange(1, TOKENS + 1).repeat(ROWS, 1)).arguments(model))
    return calls


def _find_features(attention: nn.Module, found: _Attention, call: Call) -> tuple[list[Features], dict[str, int]]:
    """What q, k and v of each query head are made of, and how many features each source has.

    Raises:
        CannotJudge: it is not certain.
    """
    experiment = _Experiment(attention, found, call, seed=0)
    first, second = experiment.features(), _Experiment(attention, found, call, seed=1).features()
    queries = [{(path, at) for path, own in head["q"].items() for at in own} for head in first]
    if (
        first != second
        or len({len(own) for own in queries}) > 1
        or sum(map(len, queries)) != len(set().union(*queries))
    ):
        raise CannotJudge(f"experiments on {found.name} disagree, or heads have no queries of their own")
    return first, {path: given.shape[-1] for path, given in experiment.given.items()}


class _Experiment:
    """One attention module, run with random numbers in the place of what its linear layers give."""

    def __init__(self, attention: nn.Module, found: _Attention, call: Call, seed: int) -> None:
        self.attention, self.found, self.call = attention, found, call
        self.generator = torch.Generator().manual_seed(seed)
        self.given: dict[str, Tensor] = {}
        """By path, the numbers `[token, feature]` in the place of what a module gives; of those that ran."""

    def features(self) -> list[Features]:
        """What q, k and v of each query head are made of.

        Raises:
            CannotJudge: a feature acts as two of them, a head lacks one of them, or its z is another head's.
        """
        self._run([], held=False)
        features = [(path, at) for path, given in self.given.items() for at in range(given.shape[-1])]
        heads: list[dict[Role, dict[str, set[int]]]] = [{role: {} for role in ROLES} for _ in range(self.found.heads)]
        for start in range(0, len(features), ROWS - 1):
            changed = features[start : start + ROWS - 1]
            scores, z = self._run(changed, held=False)
            _, held_z = self._run(changed, held=True)
            later = scores[:, CHANGED + 1 :].any(1)  # [feature, head, key]
            keys, values = later[..., CHANGED], held_z[:, CHANGED + 1 :].any(1)  # [feature, head]
            queries = scores[:, CHANGED].any(-1) & ~keys
            mixed = later.sum(-1) > keys  # a key that is made of several tokens
            patterns = keys | queries
            two_roles = (patterns.any(1) & held_z.any(1).any(1)) | (keys.any(1) & queries.any(1))
            if two_roles.any() or mixed.any() or (patterns.any(1)[:, None] & (patterns != z.any(1))).any():
                raise CannotJudge(f"features of {self.found.name} act on several heads or in several ways")
            for role, acting in zip(ROLES, (queries, keys, values), strict=True):
                for feature, head in acting.nonzero().tolist():
                    path, at = changed[feature]
                    heads[head][role].setdefault(path, set()).add(at)
        if not all(head[role] for head in heads for role in ROLES):
            raise CannotJudge(f"a head of {self.found.name} reads no query, key or value of its own")
        return [{role: {path: frozenset(at) for path, at in head[role].items()} for role in ROLES} for head in heads]

    def _run(self, changed: Sequence[tuple[str, int]], held: bool) -> tuple[Tensor, Tensor]:
        """Which scores `[feature, query, head, key]` and which z `[feature, token, head]` each changed feature moves.

        Args:
            held: give all rows the patterns of the row in which nothing is changed.
        """
        found, heads = [], self.found.heads
        tap = _PatternTap(ROWS, heads, held)

        def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.append(args[0].reshape(ROWS, TOKENS, heads, -1))
            raise OutputReached

        with ExitStack() as stack:
            for path in self.found.sources:
                stack.callback(self._replace_output(path, changed).remove)
            output = self.attention.get_submodule(self.found.output)
            stack.callback(output.register_forward_pre_hook(stop).remove)
            again = self.call.held()
            with tap, suppress(OutputReached):
                self.attention(*again.args, **again.kwargs)
        if not found or not tap.changes:
            raise CannotJudge(f"{self.found.name}, run by itself, did not reach its output projection")
        z, rows = found[0][0], slice(1, len(changed) + 1)
        change = found[0] - z
        if held:
            change = change - z * (change * z).sum(-1, keepdim=True) / z.square().sum(-1, keepdim=True)
        scores = torch.stack([_is_more_than_rounding(*one).transpose(1, 2) for one in tap.changes]).any(0)
        return scores[rows], _is_more_than_rounding(change, z).any(-1)[rows]

    def _replace_output(self, path: str, changed: Sequence[tuple[str, int]]) -> Any:
        def hook(_: nn.Module, args: Any, result: Tensor) -> Tensor:
            if result.shape[0] not in (ROWS, ROWS * TOKENS):
                raise CannotJudge(f"{path} gives {list(result.shape)}, which does not begin with rows")
            if path not in self.given:
                width = result.numel() // (ROWS * TOKENS)
                size = 0.5 + torch.rand(TOKENS, width, generator=self.generator)
                self.given[path] = size * (2 * torch.randint(2, size.shape, generator=self.generator) - 1)
            given = self.given[path].to(result).repeat(ROWS, 1, 1)
            own = [(row, at) for row, (name, at) in enumerate(changed, 1) if name == path]
            if own:
                rows, features = torch.tensor(own, device=result.device).T
                given[rows, CHANGED, features] += STEP
            return given.reshape(result.shape)

        return self.attention.get_submodule(path).register_forward_hook(hook)


def _is_more_than_rounding(change: Tensor, size: Tensor) -> Tensor:
    """Which changes of numbers that are as large as `size` are real."""
    eps = torch.finfo(change.dtype).eps
    return change.abs() > (1e-5 if eps < 1e-5 else 4 * eps) * size.abs().max()


class _PatternTap(TorchFunctionMode):
    """Makes every pattern soft, keeps what changes of the scores, and on request holds all rows at the first.

    What is added to all scores of a query changes no pattern, and may be the largest of them, taken off before the
    softmax: a change is what remains when those at all other tokens are 0 in the mean.
    """

    def __init__(self, rows: int, heads: int, held: bool) -> None:
        super().__init__()
        self.rows, self.heads, self.held = rows, heads, held
        self.changes: list[tuple[Tensor, Tensor]] = []
        """Of each softmax, by how much scores `[row, head, query, key]` change, and how large those of one row are."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in SOFTMAX or not fits_pattern(args[0], self.rows, TOKENS, self.heads):
            return func(*args, **(kwargs or {}))
        pattern = func(args[0] * 0.1, *args[1:], **(kwargs or {}))
        by_head = (self.rows, self.heads, TOKENS, -1)
        visible = pattern.reshape(by_head)[..., :TOKENS] > 0  # without the column that a sink may have
        scores = args[0].reshape(by_head)[..., :TOKENS].where(visible, 0.0)
        others = visible & (torch.arange(TOKENS, device=visible.device) != CHANGED)
        change = scores - scores[:1]
        shift = (change * others).sum(-1, keepdim=True) / others.sum(-1, keepdim=True).clamp_min(1)
        self.changes.append(((change - shift).where(visible, 0.0), scores[0]))
        return pattern.reshape(by_head)[:1].repeat(self.rows, 1, 1, 1).reshape(pattern.shape) if self.held else pattern


def _site(model: PreTrainedModel, found: _Attention, features: Sequence[Features], widths: Mapping[str, int]) -> Site:
    """The site that these features make.

    Raises:
        CannotJudge: heads have different numbers of features, or do not share values group by group.
    """
    values = [tuple(sorted((path, *sorted(own)) for path, own in head["v"].items())) for head in features]
    group = found.heads // len(set(values))
    if any(values[head] != values[head // group * group] for head in range(found.heads)):
        raise CannotJudge(f"heads of {found.name} that read one KV head are not neighbours")
    parts: dict[str, Part] = {}
    for role in ROLES:
        paths = {path for head in features for path in head[role]}
        for path in sorted(paths):
            name = role if len(paths) == 1 else f"{role} in {path}"
            parts[name] = _part(role, path, widths[path], [head[role].get(path, frozenset()) for head in features])
    return Site(
        layer=found.number.layer,
        layers=found.number.layers,
        name=found.name,
        module=model.get_submodule(found.name),
        output_name=found.output,
        heads=found.heads,
        group=group,
        parts=parts,
    )


def _part(role: Role, path: str, width: int, own: Sequence[frozenset[int]]) -> Part:
    distinct = list(dict.fromkeys(own))
    if len({len(one) for one in distinct}) > 1:
        raise CannotJudge(f"heads have {role} of different sizes in {path}")
    readers = tuple(tuple(head for head, each in enumerate(own) if each == one) for one in distinct)
    return Part(role, path, width, torch.tensor([sorted(one) for one in distinct]), readers)
