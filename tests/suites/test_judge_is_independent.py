"""The judge finds heads by itself: an engine whose own search is wrong is refused on models that no table knows."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import pytest_circuitfreeze.suites
from freeze_core import InterventionConfig
from freeze_core.attention import probe as engine_probe
from pytest_circuitfreeze.engines import FreezeCore
from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.claims import ClaimBroken
from pytest_circuitfreeze.suites.gradients import check_gradients_are_the_estimators
from pytest_circuitfreeze.suites.grouping import check_frozen_values_reach_their_readers
from pytest_circuitfreeze.suites.judge.judged_sites import CannotJudge
from pytest_circuitfreeze.suites.judge.site_lookup import sites
from pytest_circuitfreeze.suites.values import check_values_are_the_oracles

sys.path.append(str(Path(__file__).parents[1] / "freeze_core"))

from named_attention import DIM, HEADS, Named, with_attention

BATCH = Batch(torch.tensor([[7, 3, 11, 5, 2, 13], [4, 19, 6, 23, 8, 29]]))
CHECKS: Mapping[Any, InterventionConfig] = {
    check_values_are_the_oracles: InterventionConfig([1], [1], "ov"),
    check_gradients_are_the_estimators: InterventionConfig([1], [1], "ov"),
    check_frozen_values_reach_their_readers: InterventionConfig([1], [1], "v"),
}
LISTED = (check_values_are_the_oracles, check_gradients_are_the_estimators)
Heads = list[Mapping[Any, Any]]


def own_model() -> PreTrainedModel:
    """A GQA model whose attention is of a new class, under names that nobody knows."""

    class SeekingAttention(Named):
        def __init__(self, old: Any) -> None:
            nn.Module.__init__(self)
            self.config = old.config
            self.asks, self.offers, self.gives, self.blends = old.q_proj, old.k_proj, old.v_proj, old.o_proj

        def read(self, hidden: Any) -> Any:
            return [self.heads(linear(hidden)) for linear in (self.asks, self.offers, self.gives)]

        def mix(self, z: Any) -> Any:
            return self.blends(z.transpose(1, 2).flatten(2))

    made: PreTrainedModel = with_attention(SeekingAttention, "llama_gqa")
    return made


def swap_keys_and_values(heads: Heads) -> Heads:
    return [{"q": head["q"], "k": head["v"], "v": head["k"]} for head in heads]


def shift_groups(heads: Heads) -> Heads:
    """Each KV head is said to be the next one's, the last one to be the first one's."""
    group = sum(head["v"] == heads[0]["v"] for head in heads)
    moved = heads[group:] + heads[:group]
    return [{"q": own["q"], "k": other["k"], "v": other["v"]} for own, other in zip(heads, moved, strict=True)]


def break_probe(monkeypatch: pytest.MonkeyPatch, change: Callable[[Heads], Heads]) -> None:
    """Changes what the engine's probe finds, for everyone who uses it."""
    own = engine_probe.probe

    def broken(*args: Any, **options: Any) -> Any:
        return change(own(*args, **options))

    for module in list(sys.modules.values()):
        if vars(module).get("probe") is own:
            monkeypatch.setattr(module, "probe", broken)


def refused(model: PreTrainedModel) -> set[Any]:
    found = set()
    for check, config in CHECKS.items():
        try:
            check(FreezeCore(), model, [config] if check in LISTED else config, BATCH)
        except ClaimBroken:
            found.add(check)
    return found


def test_an_engine_with_a_right_probe_is_accepted() -> None:
    assert refused(own_model()) == set()


@pytest.mark.parametrize("change", [swap_keys_and_values, shift_groups])
def test_an_engine_with_a_broken_probe_is_refused(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    break_probe(monkeypatch, change)
    assert refused(own_model()) == set(CHECKS)


def test_sites_of_an_unknown_class_are_what_its_code_reads() -> None:
    model = own_model()
    found = sites(model)
    assert sorted(found) == [0, 1, 2]
    for site in found.values():
        assert (site.heads, site.group, site.output_name, site.formula) == (HEADS, 2, "blends", None)
        for role, path, heads in (("q", "asks", 4), ("k", "offers", 2), ("v", "gives", 2)):
            part = site.parts[role]
            assert (part.path, part.width, len(part.readers)) == (path, heads * DIM, heads)
            assert torch.equal(part.features, torch.arange(heads * DIM).view(heads, DIM))


class SharesKeysAndValues(Named):
    """Its keys are its values: nothing is a head's value alone."""

    def read(self, hidden: Any) -> Any:
        q, k, _ = super().read(hidden)
        return [q, k, k]


class ReadsOtherHeadsOfTheOutput(Named):
    """The output projection takes features of all heads in turn, so that a stretch of z is no head's."""

    def mix(self, z: Any) -> Any:
        return self.o_proj(z.permute(0, 2, 3, 1).flatten(2))


class MixesHeads(Named):
    """Each head passes half of its z on to the next."""

    def mix(self, z: Any) -> Any:
        mixed: Any = super().mix((z + z.roll(1, dims=1)) / 2)
        return mixed


class TokensFirst(Named):
    """Projects `[token, batch, feature]`, so that rows cannot be told from tokens."""

    def read(self, hidden: Any) -> Any:
        return [one.permute(2, 1, 0, 3) for one in super().read(hidden.transpose(0, 1))]


class MixesTokens(Named):
    """A key is made of two tokens, as behind a short convolution."""

    def read(self, hidden: Any) -> Any:
        q, k, v = super().read(hidden)
        return [q, k + k.roll(1, dims=2), v]


class ScalesByScores(Named):
    """What each token gets is scaled by its scores, as by a sink that is kept out of the softmax."""

    def mix(self, z: Any) -> Any:
        scores = self.seen["q"] @ self.seen["k"].transpose(2, 3)
        mixed: Any = super().mix(z * scores.tril().logsumexp(-1, keepdim=True).sigmoid())
        return mixed


@pytest.mark.parametrize("attention", [Named, ScalesByScores])
def test_what_scales_z_is_no_value(attention: Any) -> None:
    for site in sites(with_attention(attention, "llama")).values():
        assert {name: part.path for name, part in site.parts.items()} == {"q": "q_proj", "k": "k_proj", "v": "v_proj"}


@pytest.mark.parametrize(
    "attention", [SharesKeysAndValues, ReadsOtherHeadsOfTheOutput, MixesHeads, MixesTokens, TokensFirst]
)
def test_attention_that_has_no_clear_heads_is_not_judged(attention: Any) -> None:
    with pytest.raises(CannotJudge, match="queries, keys and values can be told apart"):
        sites(with_attention(attention, "llama"))


def test_suites_import_nothing_from_inside_the_engine() -> None:
    folder = Path(str(pytest_circuitfreeze.suites.__file__)).parent
    imported = {
        (str(file.relative_to(folder)), name)
        for file in sorted(folder.rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        for name in _imported(node)
        if name.split(".")[0] == "freeze_core"
    }
    assert len(imported) > 20  # the test sees imports at all
    assert {place for place in imported if place[1] not in ("freeze_core", "freeze_core.errors")} == set()


def _imported(node: ast.AST) -> list[str]:
    """The modules that a statement imports; of `from freeze_core import attention` the module inside."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module == "freeze_core":
        inside = [f"freeze_core.{alias.name}" for alias in node.names]
        return [name if name in sys.modules else "freeze_core" for name in inside]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
