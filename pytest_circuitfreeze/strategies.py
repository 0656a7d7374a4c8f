"""Hypothesis strategies for freezes and for what a model is run on.

Everything is drawn as small plain values, so that a failing example reads well and shrinks well; each strategy says
towards what it shrinks. Use them in tests of your own::

    @given(data=st.data())
    def test_mine(circuit_model, data):
        config = data.draw(configs(circuit_model, circuit=st.just("ov")))
        batch = data.draw(batches(circuit_model))
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor

from pytest_circuitfreeze.stated import STATED, demand
from pytest_circuitfreeze.wrapped import config_of, device_of, forward_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from freeze_core import InterventionConfig
    from pytest_circuitfreeze.recordings import Calibrated, Recorded

__all__ = [
    "Batch",
    "attending_layers",
    "backward_modes",
    "batches",
    "calibrations",
    "circuits",
    "configs",
    "configs_of_each_kind",
    "configs_without_statistics",
    "freeze_types",
    "head_indices",
    "heads_by_layer",
    "in_both_scopes",
    "layer_indices",
    "noise_stds",
    "references",
    "scopes",
    "seeds",
    "strengths",
    "vocabulary",
]

T = TypeVar("T")

LONGEST = 12
"""Longest drawn prompt, in tokens: longer than the tiny models' sliding window."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Token ids `[batch, token]` and a mask of the same shape, 1 where a token is real; `None` hands over no mask."""

    input_ids: Tensor
    attention_mask: Tensor | None = None

    @classmethod
    def of_tokens(cls, input_ids: Tensor) -> Batch:
        """A batch without padding and without a mask."""
        return cls(input_ids)

    @property
    def real(self) -> Tensor:
        """`[batch, token]` bool, true where a token is not padding."""
        if self.attention_mask is None:
            return torch.ones_like(self.input_ids, dtype=torch.bool)
        return self.attention_mask.bool()

    def arguments(self, model: PreTrainedModel) -> dict[str, Any]:
        """Keyword arguments for `model`: no cache; positions count real tokens, so that left padding is right."""
        positions = (self.real.long().cumsum(-1) - 1).clamp_min(0)
        found = {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "position_ids": positions}
        known, device = forward_parameters(model), device_of(model)
        given: dict[str, Any] = {
            name: value.to(device) for name, value in found.items() if value is not None and name in known
        }
        takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values())
        return {**given, "use_cache": False} if "use_cache" in known or takes_all else given

    def __repr__(self) -> str:
        mask = None if self.attention_mask is None else self.attention_mask.tolist()
        return f"Batch(input_ids={self.input_ids.tolist()}, attention_mask={mask})"


def layer_indices(layers: int, *, most: int = 2) -> st.SearchStrategy[list[int]]:
    """One to `most` different layers of a model that has `layers`. Shrinks to `[0]`, the first layer."""
    return st.lists(st.integers(0, layers - 1), min_size=1, max_size=min(most, layers), unique=True)


def attending_layers(model: PreTrainedModel, *, most: int = 2) -> st.SearchStrategy[list[int]]:
    """One to `most` different layers of `model` that have attention. Shrinks to the first one."""
    attending = sorted(heads_by_layer(model))
    return layer_indices(len(attending), most=most).map(lambda chosen: [attending[at] for at in chosen])


def head_indices(heads: int, *, most: int | None = None) -> st.SearchStrategy[list[int]]:
    """One to `most` (all, by default) different query heads of a layer that has `heads`. Shrinks to `[0]`.

    One alone half of the time: of several, some often share a KV head, which hides what is wrong with either.
    """
    one = st.integers(0, heads - 1)
    return st.one_of(one.map(lambda head: [head]), st.lists(one, min_size=1, max_size=most or heads, unique=True))


def circuits() -> st.SearchStrategy[str]:
    """A circuit or a single activation. Shrinks to `ov`, which is `v` alone and leaves attention's shape alone."""
    return st.sampled_from(["ov", "qk", "both", "v", "q", "k"])


def freeze_types(batch: Batch | None = None) -> st.SearchStrategy[str]:
    """A replacement, of those that `batch` can be run with, if it is given. Shrinks to `zero`."""
    return st.sampled_from(_kinds(batch))


def _kinds(batch: Batch | None) -> list[str]:
    kinds = ["zero", "mean", "noise"]
    if batch is not None:
        kinds.append("reference")
        if len(batch.input_ids) > 1 and batch.real.all():
            kinds.append("resample")
    return kinds


def backward_modes() -> st.SearchStrategy[str]:
    """A backward mode. Shrinks to `stopgrad`."""
    return st.sampled_from(["stopgrad", "ste", "circuit_ste"])


def scopes() -> st.SearchStrategy[str]:
    """A KV scope. Shrinks to `group`, which changes nothing about the model's shape."""
    return st.sampled_from(["group", "head"])


def strengths(*, least: float = 0.0) -> st.SearchStrategy[float]:
    """A strength in [`least`, 1], the ends more often than chance. Shrinks to 1, the whole freeze."""
    return st.one_of(st.sampled_from([1.0, least]), st.floats(least, 1.0))


def seeds() -> st.SearchStrategy[int]:
    """Any int that may seed noise or resampling, negative and large ones included. Shrinks to 0."""
    return st.integers(-(2**40), 2**40)


def noise_stds() -> st.SearchStrategy[float | None]:
    """`None` (mean and deviation of the pass) or a standard deviation. Shrinks to `None`."""
    return st.one_of(st.none(), st.floats(0.0, 3.0))


def _or(given: st.SearchStrategy[T] | None, usual: st.SearchStrategy[T]) -> st.SearchStrategy[T]:
    return usual if given is None else given


def vocabulary(model: PreTrainedModel) -> int:
    """Number of token ids that `model` takes."""
    return int(config_of(model).get_text_config(decoder=True).vocab_size)


def _tokens(model: PreTrainedModel, rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Not 0, which CPM-Ant takes for padding whatever the mask says.
    return torch.randint(1, vocabulary(model), (rows, columns), generator=generator)


def heads_by_layer(model: PreTrainedModel) -> dict[int, int]:
    """The number of query heads of each decoder layer of `model` that has attention."""
    from pytest_circuitfreeze.suites.judge.site_lookup import sites

    return {layer: site.heads for layer, site in sites(model).items()}


@st.composite
def references(draw: st.DrawFn, model: PreTrainedModel, batch: Batch, layers: Sequence[int] | None = None) -> Recorded:
    """What `layers` of `model` do on other tokens in the shape of `batch`, or in one row that is to serve all of them.

    Shrinks to one row. What `freeze_core` cannot record is not drawn.
    """
    from freeze_core import UnsupportedModelError

    try:
        return _reference(draw, model, batch, layers)
    except UnsupportedModelError:
        reject()


def _reference(draw: st.DrawFn, model: PreTrainedModel, batch: Batch, layers: Sequence[int] | None) -> Recorded:
    from pytest_circuitfreeze.recordings import recorded

    alike = bool((batch.real == batch.real[:1]).all())
    rows = draw(st.sampled_from([1, len(batch.input_ids)])) if alike else len(batch.input_ids)
    ids = _tokens(model, rows, batch.input_ids.shape[1], draw(st.integers(0, 2**16)))
    mask = None if batch.attention_mask is None else batch.attention_mask[:rows]
    return recorded(model, Batch(ids, mask), layers)


@st.composite
def calibrations(
    draw: st.DrawFn, model: PreTrainedModel, layers: Sequence[int] | None = None, *, least: int = 1
) -> Calibrated:
    """Statistics of `layers` of `model` over `least` drawn batches, or one more. Shrinks to those of one token each.

    What `freeze_core` cannot record is not drawn.
    """
    from freeze_core import UnsupportedModelError

    try:
        return _statistics(draw, model, layers, least)
    except UnsupportedModelError:
        reject()


def _statistics(draw: st.DrawFn, model: PreTrainedModel, layers: Sequence[int] | None, least: int = 1) -> Calibrated:
    from pytest_circuitfreeze.recordings import calibrated

    return calibrated(model, draw(st.lists(batches(model), min_size=least, max_size=least + 1)), layers)


@st.composite
def configs(
    draw: st.DrawFn,
    model: PreTrainedModel,
    *,
    circuit: st.SearchStrategy[str] | None = None,
    freeze_type: st.SearchStrategy[str] | None = None,
    backward_mode: st.SearchStrategy[str] | None = None,
    kv_scope: st.SearchStrategy[str] | None = None,
    strength: st.SearchStrategy[float] | None = None,
    noise_std: st.SearchStrategy[float | None] | None = None,
    layers: st.SearchStrategy[list[int]] | None = None,
    heads: st.SearchStrategy[list[int]] | None = None,
    batch: Batch | None = None,
) -> InterventionConfig:
    """An `InterventionConfig` for `model`. Shrinks to head 0 of layer 0, V to zero, at full strength.

    Args:
        model: says how many layers and query heads there are.
        circuit, freeze_type, backward_mode, kv_scope, strength, noise_std, layers, heads: narrower strategies for
            these fields; one or two layers that have attention are drawn by default.
        batch: what the freeze is for; with it, replacements from elsewhere are drawn, too: recorded on other inputs,
            taken from other rows, calibrated over other batches.
    """
    from freeze_core import InterventionConfig

    stated = STATED.get()
    if isinstance(stated, InterventionConfig):
        demand(_or(freeze_type, freeze_types(batch)), "freeze_type", stated.freeze_type)
        narrower: dict[str, st.SearchStrategy[Any] | None] = {
            "circuit": circuit,
            "backward_mode": backward_mode,
            "kv_scope": kv_scope,
            "strength": strength,
            "noise_std": noise_std if stated.freeze_type == "noise" else None,
        }
        for field, allowed in narrower.items():
            if allowed is not None:
                demand(allowed, field, getattr(stated, field))
        return stated
    kind = draw(_or(freeze_type, freeze_types(batch)))
    noisy = kind == "noise"
    by_layer = heads_by_layer(model)
    chosen = draw(_or(layers, attending_layers(model)))
    std = draw(_or(noise_std, noise_stds())) if noisy else None
    of_the_pass = kind == "mean" or (noisy and std is None)
    return InterventionConfig(
        layer_indices=chosen,
        head_indices=draw(_or(heads, head_indices(min(by_layer[layer] for layer in chosen)))),
        circuit=draw(_or(circuit, circuits())),
        freeze_type=kind,
        backward_mode=draw(_or(backward_mode, backward_modes())),
        kv_scope=draw(_or(kv_scope, scopes())),
        strength=draw(_or(strength, strengths(least=0.01))),
        seed=draw(seeds()) if noisy or kind == "resample" else 0,
        noise_std=std,
        statistics=draw(st.none() | calibrations(model, chosen)) if of_the_pass and batch is not None else None,
        reference=draw(references(model, batch, chosen)) if kind == "reference" and batch is not None else None,
    )


@st.composite
def configs_of_each_kind(draw: st.DrawFn, model: PreTrainedModel, batch: Batch) -> list[InterventionConfig]:
    """A config of each replacement, from the pass or from elsewhere, that `batch` can be run with.

    Were one of them drawn for each example, a few dozen examples would often have none of some. Each shrinks as
    `configs` do. What `freeze_core` cannot record is left out.
    """
    from freeze_core import UnsupportedModelError

    if STATED.get() is not None:
        return [draw(configs(model, batch=batch))]
    of_the_pass, own = st.none(), st.floats(0.1, 3.0)
    kinds: list[tuple[str, st.SearchStrategy[float | None]]] = [
        *((kind, of_the_pass) for kind in ("zero", "mean", "noise")),
        ("noise", own),
        ("resample", of_the_pass),
    ]
    found = [
        draw(configs(model, freeze_type=st.just(kind), noise_std=std)) for kind, std in kinds if kind in _kinds(batch)
    ]
    for kind in ("mean", "noise", "reference"):
        plain = draw(configs(model, freeze_type=st.just("zero")))
        held: dict[str, Any] = {"seed": draw(seeds())} if kind == "noise" else {}
        try:
            if kind == "reference":
                held["reference"] = _reference(draw, model, batch, plain.layer_indices)
            else:
                held["statistics"] = _statistics(draw, model, plain.layer_indices)
        except UnsupportedModelError:
            continue
        found.append(replace(plain, freeze_type=kind, **held))
    return found


def in_both_scopes(strategy: st.SearchStrategy[InterventionConfig]) -> st.SearchStrategy[list[InterventionConfig]]:
    """A config of `strategy` in each `kv_scope`, `group` first; a stated one as it is. Shrinks as `strategy` does."""

    def both(config: InterventionConfig) -> list[InterventionConfig]:
        return [config] if config is STATED.get() else [replace(config, kv_scope=scope) for scope in ("group", "head")]

    return strategy.map(both)


def configs_without_statistics(
    model: PreTrainedModel, *, strength: st.SearchStrategy[float] | None = None
) -> st.SearchStrategy[InterventionConfig]:
    """`configs` whose replacement is no statistic of the pass: zero, or noise of its own size. Shrinks as they do."""
    kinds = st.sampled_from(["zero", "noise"])
    return configs(model, freeze_type=kinds, noise_std=st.floats(0.1, 3.0), strength=strength)


@st.composite
def batches(
    draw: st.DrawFn,
    model: PreTrainedModel,
    *,
    rows: st.SearchStrategy[int] | None = None,
    tokens: st.SearchStrategy[int] | None = None,
    padding: bool = True,
) -> Batch:
    """A batch of 1 to 3 prompts of 1 to 12 tokens, padded left or right, or not at all, with at least one real token.

    Shrinks to one unpadded token without a mask. Tokens come from a drawn seed, so they do not shrink one by one.

    Args:
        model: says how large the vocabulary is.
        rows, tokens: narrower strategies for the shape.
        padding: whether rows may be padded.
    """
    stated = STATED.get()
    if isinstance(stated, Batch):
        for name, allowed, size in zip(("rows", "tokens"), (rows, tokens), stated.input_ids.shape, strict=True):
            if allowed is not None:
                demand(allowed, name, size)
        demand(st.sampled_from([False, padding]), "padding", not bool(stated.real.all()))
        return stated
    batch = draw(_or(rows, st.integers(1, 3)))
    length = draw(_or(tokens, st.integers(1, LONGEST)))
    input_ids = _tokens(model, batch, length, draw(st.integers(0, 2**16)))
    # Padded twice as often as not: most of what goes wrong goes wrong there.
    side = draw(st.sampled_from(["none", "ones", *["left", "right"] * 2] if padding else ["none", "ones"]))
    if side == "none":
        return Batch(input_ids)
    mask = torch.ones(batch, length, dtype=torch.long)
    if side in ("left", "right"):
        for row in range(batch):
            padded = draw(st.integers(0, length - 1))
            mask[row, :padded] = 0
            if side == "right":
                mask[row] = mask[row].flip(0)
    return Batch(input_ids, mask)
