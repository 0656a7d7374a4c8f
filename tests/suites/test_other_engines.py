"""The judge sees through what an engine does: hooks that it removes, models that it runs, what it left once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from honest_engine import HookEngine
from snippet_runs import demand_the_same, run, snippet_of
from torch import nn
from transformers import PreTrainedModel

from freeze_core import InterventionConfig
from pytest_circuitfreeze.engines import load_engine
from pytest_circuitfreeze.models import tiny_model
from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.claims import ClaimBroken
from pytest_circuitfreeze.suites.gradients import check_gradients_are_the_estimators
from pytest_circuitfreeze.suites.hooks import check_hooks_of_others_stay
from pytest_circuitfreeze.suites.judge.equivalent_models import equivalent_models
from pytest_circuitfreeze.suites.judge.judged_sites import CannotJudge
from pytest_circuitfreeze.suites.judge.visible_state import remember_untouched
from pytest_circuitfreeze.suites.refusals import refusal
from pytest_circuitfreeze.suites.removal import check_error_in_forward_leaves_no_trace, check_removal_leaves_no_trace
from pytest_circuitfreeze.suites.storage import check_storage_does_not_matter
from pytest_circuitfreeze.suites.values import check_values_are_the_oracles

IDS = torch.tensor([[7, 3, 11, 5, 2], [4, 19, 6, 23, 8]])
BATCH = Batch(IDS, torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]))
CONFIG = InterventionConfig(layer_indices=[1], head_indices=[1], freeze_type="mean", strength=0.5)


class RemovesHooks(HookEngine):
    """Takes away all hooks that it finds on a model before each pass, and puts its own there."""

    @contextmanager
    def freeze(self, model: nn.Module, config: Any) -> Iterator[Callable[..., Any]]:
        with super().freeze(model, config) as frozen:

            def run(**arguments: Any) -> Any:
                for module in model.modules():
                    module._forward_hooks.clear()
                    module._forward_pre_hooks.clear()
                self.install(model)
                return frozen(**arguments)

            yield run


class RunsACopy(HookEngine):
    """Freezes a copy of the model, which has its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()

    def copied(self, model: nn.Module) -> nn.Module:
        if model not in self.copies:
            self.copies[model] = copy.deepcopy(model, {id(one): one for one in model.parameters()})
            self.copies[model].config._attn_implementation = "eager"
        return self.copies[model]

    def unfrozen(self, model: nn.Module) -> Callable[..., Any]:
        own = self.copied(model)

        def run(**arguments: Any) -> Any:
            return own(**arguments)

        run.stand_in = own
        return run

    @contextmanager
    def freeze(self, model: nn.Module, config: Any) -> Iterator[Callable[..., Any]]:
        with super().freeze(self.copied(model), config):
            yield self.unfrozen(model)


class NextHeadOfACopy(RunsACopy):
    """The same, and freezes the head after the one that was asked for."""

    def heads(self, *args: Any) -> list[int]:
        return [(head + 1) % 2 for head in super().heads(*args)]


class CopiesFused(RunsACopy):
    """The same, with fused projections of its own, whose gradients the model never sees."""

    def copied(self, model: nn.Module) -> nn.Module:
        own = super().copied(model)
        for module in own.modules():
            if hasattr(module, "c_attn"):
                module.c_attn.weight = nn.Parameter(module.c_attn.weight.detach().clone())
        return own


class MarksOnce(HookEngine):
    """Leaves an attribute on a model for good when it first freezes it."""

    def install(self, model: nn.Module) -> None:
        super().install(model)
        model.frozen_before = True


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama_gqa")


def test_an_engine_without_a_hash_is_asked_once_whether_it_refuses(model: PreTrainedModel) -> None:
    @dataclass
    class Equal:
        name: str = "equal"
        asked: int = 0

        def refuses(self, model: nn.Module) -> str:
            self.asked += 1
            return "no attention that it knows"

    engine = Equal()
    assert [refusal(engine, model) for _ in range(2)] == ["no attention that it knows"] * 2
    assert engine.asked == 1


def test_an_engine_that_removes_hooks_is_seen_through_and_told(model: PreTrainedModel) -> None:
    check_values_are_the_oracles(RemovesHooks(), model, [CONFIG], BATCH)
    check_gradients_are_the_estimators(RemovesHooks(), model, [CONFIG], BATCH)
    assert "forward" not in vars(model.model.layers[1].self_attn)
    with pytest.raises(
        ClaimBroken, match="not called in pass 1: 20 hooks, such as the forward hook of k_proj of before"
    ):
        check_hooks_of_others_stay(RemovesHooks(), model, CONFIG, BATCH)


def test_a_model_that_runs_in_place_of_another_is_looked_into(model: PreTrainedModel) -> None:
    for check in (check_values_are_the_oracles, check_gradients_are_the_estimators):
        check(RunsACopy(), model, [CONFIG], BATCH)
    check_error_in_forward_leaves_no_trace(RunsACopy(), model, CONFIG, BATCH)
    check_hooks_of_others_stay(RunsACopy(), model, CONFIG, BATCH)
    broken = load_engine(f"{__name__}:NextHeadOfACopy")
    with pytest.raises(ClaimBroken, match=r"z off by .*\n  at: layer 1") as caught:
        check_values_are_the_oracles(broken, model, [CONFIG], BATCH)
    demand_the_same(run(snippet_of(caught.value)), caught.value)


def test_what_does_not_run_in_it_cannot_be_judged(model: PreTrainedModel) -> None:
    class RunsNothing(RunsACopy):
        def unfrozen(self, model: nn.Module) -> Callable[..., Any]:
            run = super().unfrozen(model)
            run.stand_in = copy.deepcopy(run.stand_in)
            return run

    with pytest.raises(CannotJudge, match="attention of layer 1 did not run in the model"):
        check_values_are_the_oracles(RunsNothing(), model, [CONFIG], BATCH)


def test_projections_without_a_gradient_break_a_claim() -> None:
    gpt2 = tiny_model("gpt2")
    lost = r"no gradient of c_attn\.weight in GPT2LMHeadModel\n  at: layer 0"
    with pytest.raises(ClaimBroken, match=lost):
        check_storage_does_not_matter(CopiesFused(), gpt2, equivalent_models(gpt2)[0], CONFIG, BATCH)


def test_what_the_first_freeze_left_is_found_by_later_ones(model: PreTrainedModel) -> None:
    remember_untouched(model)
    check_removal_leaves_no_trace(HookEngine(), model, CONFIG, BATCH)
    with MarksOnce().freeze(model, CONFIG):
        pass
    with pytest.raises(ClaimBroken, match=r"model\.frozen_before is there since an earlier freeze"):
        check_removal_leaves_no_trace(MarksOnce(), model, CONFIG, BATCH)
