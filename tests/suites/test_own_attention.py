"""Models whose attention reads its projections otherwise than their names say: what trusts names there is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from honest_engine import HookEngine
from transformers import PreTrainedModel

from freeze_core import InterventionConfig
from pytest_circuitfreeze.engines import FreezeCore
from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.claims import ClaimBroken
from pytest_circuitfreeze.suites.gradients import check_gradients_are_the_estimators
from pytest_circuitfreeze.suites.grouping import (
    check_frozen_queries_and_keys_reach_their_readers,
    check_frozen_values_reach_their_readers,
)
from pytest_circuitfreeze.suites.independence import check_ov_leaves_qk, check_qk_leaves_ov
from pytest_circuitfreeze.suites.judge.site_lookup import sites
from pytest_circuitfreeze.suites.locality import check_other_heads_are_untouched
from pytest_circuitfreeze.suites.values import check_values_are_the_oracles

sys.path.append(str(Path(__file__).parents[1] / "freeze_core"))

from named_attention import GPT2Attention, KeysAreValues, Plain, Strided, with_attention

BATCH = Batch(torch.tensor([[7, 3, 11, 5, 2, 13], [4, 19, 6, 23, 8, 29]]))
MODELS = {
    "plain": (Plain, "llama_gqa"),
    "strided": (Strided, "llama"),
    "keys_are_values": (KeysAreValues, "llama_gqa"),
    "keys_first": (GPT2Attention, "gpt2"),
}
TRUSTING = [name for name in MODELS if name != "plain"]
OV, V, Q = {"circuit": "ov"}, {"circuit": "v"}, {"circuit": "q"}
# Queries at zero and keys at zero make the same pattern; noise tells them apart.
NOISE = {"circuit": "q", "freeze_type": "noise", "noise_std": 1.0}
CHECKS: dict[Any, tuple[dict[str, Any], ...]] = {
    check_values_are_the_oracles: (NOISE, OV),
    check_gradients_are_the_estimators: (NOISE, OV),
    check_other_heads_are_untouched: (OV,),
    check_qk_leaves_ov: (Q,),
    check_ov_leaves_qk: (OV,),
    check_frozen_values_reach_their_readers: (V,),
    check_frozen_queries_and_keys_reach_their_readers: (Q,),
}
LISTED = (check_values_are_the_oracles, check_gradients_are_the_estimators)


def model(name: str) -> PreTrainedModel:
    made: PreTrainedModel = with_attention(*MODELS[name])
    return made


def run(check: Any, engine: Any, name: str) -> None:
    for fields in CHECKS[check]:
        config = InterventionConfig([1], [1], **fields)
        margin = check(engine, model(name), [config] if check in LISTED else config, BATCH)
        assert 0 <= margin.error <= margin.bound


@pytest.mark.parametrize("name", MODELS)
def test_the_judge_trusts_no_name_either(name: str) -> None:
    found = sites(model(name))
    assert len(found) == 3
    assert all(site.formula is None for site in found.values())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("check", CHECKS)
def test_the_product_is_accepted(check: Any, name: str) -> None:
    run(check, FreezeCore(), name)


@pytest.mark.parametrize("check", CHECKS)
def test_an_engine_that_trusts_names_is_accepted_where_they_are_right(check: Any) -> None:
    run(check, HookEngine(), "plain")


@pytest.mark.parametrize("name", TRUSTING)
def test_an_engine_that_trusts_names_is_refused_where_they_are_wrong(name: str) -> None:
    refused = set()
    for check in CHECKS:
        try:
            run(check, HookEngine(), name)
        except ClaimBroken:
            refused.add(check)
    assert {check_values_are_the_oracles, check_gradients_are_the_estimators} <= refused
