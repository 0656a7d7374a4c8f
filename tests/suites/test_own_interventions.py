"""The public checks: every shipped claim on an intervention of a user's own, drawn, stated or fixed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MappingProxyType

import pytest
import torch
from hypothesis import strategies as st
from transformers import PreTrainedModel

from freeze_core import AttentionCircuitFreezer, InterventionConfig, UnsupportedModelError
from pytest_circuitfreeze import checks
from pytest_circuitfreeze.engines import FreezeCore
from pytest_circuitfreeze.models import tiny_model
from pytest_circuitfreeze.results import CircuitRecord
from pytest_circuitfreeze.strategies import Batch, batches, configs
from pytest_circuitfreeze.suites.claims import ClaimBroken

FREEZER = AttentionCircuitFreezer()
IDS = torch.arange(1, 13).view(2, 6)


def freeze(model, config):
    return FREEZER.freeze_circuits(model, config)


def outcomes(findings: tuple[checks.Finding, ...]) -> dict[str, str]:
    return {finding.claim: finding.outcome for finding in findings}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("gpt2")


def test_a_subject_is_tried_claim_by_claim(model: PreTrainedModel) -> None:
    findings = checks.check_independence(model, freeze, examples=3)
    assert outcomes(findings) == {
        "qk_leaves_ov": "passed",
        "ov_leaves_qk": "passed",
        "order_does_not_matter": "n/a",
    }
    assert [finding.examples for finding in findings] == [3, 3, 0]
    assert findings[2].reasons == ("freeze takes one config at a time",)
    record = CircuitRecord()
    record.observe(findings[0])
    assert record.examples == 1


def test_what_is_broken_is_shown_by_its_smallest_example(model: PreTrainedModel) -> None:
    def both(model: PreTrainedModel, config: InterventionConfig) -> object:
        return FREEZER.freeze_circuits(model, InterventionConfig(config.layer_indices, config.head_indices, "both"))

    with pytest.raises(ClaimBroken) as caught:
        checks.check_qk_leaves_ov(model, both)
    shown = str(caught.value)
    assert shown.startswith("freezing QK leaves OV and other patterns\n  found: v off by ")
    assert '  config: InterventionConfig(layer_indices=[0], head_indices=[0], circuit="qk")\n' in shown
    assert "engine = engine_of(...)  # yours: function" in caught.value.call.snippet
    assert not caught.value.__notes__


class Everything:
    """An engine that freezes several at once, and remembers what it was asked for."""

    name = "everything"

    def __init__(self) -> None:
        self.asked: list[object] = []

    def freeze(self, model: PreTrainedModel, config: object) -> object:
        self.asked.append(config)
        return FREEZER.freeze_circuits(model, config)


@pytest.mark.parametrize("name", list(checks.claims()))
def test_every_shipped_claim_can_be_tried(model: PreTrainedModel, name: str) -> None:
    (finding,) = checks.check(name, model, FreezeCore(), examples=2)
    assert (finding.claim, finding.sentence, finding.outcome) == (name, checks.claims()[name], "passed")
    assert finding.examples > 0


def test_names_are_those_of_the_suites() -> None:
    assert set(checks.subjects()) >= {"independence", "locality", "removal", "values", "gradients", "caching"}
    assert not set(checks.subjects()) & set(checks.claims())
    assert {"check_independence", "check_qk_leaves_ov", "check_everything", "fixed"} <= set(dir(checks))


def test_a_stated_config_and_batch_are_what_is_tried(model: PreTrainedModel) -> None:
    engine = Everything()
    config = InterventionConfig([1], [0, -1], "qk", "noise", noise_std=0.7, seed=3, strength=0.35)
    engine.freeze = contextmanager(yielding(engine.freeze))
    batch = Batch.of_tokens(IDS)
    (finding,) = checks.check_qk_leaves_ov(model, engine, config, batch)
    assert (finding.outcome, finding.examples) == ("passed", 1)
    assert asked(engine) == [config] * len(engine.asked)
    # Columns are still drawn.
    engine.asked.clear()
    (finding,) = checks.check_later_tokens_do_not_matter(model, engine, config, batch)
    assert 1 < finding.examples <= IDS.shape[1] - 1
    assert asked(engine) == [config] * len(engine.asked)


SEVERAL = {
    "values_are_the_oracles": InterventionConfig([1], [0], "qk", "mean", "ste", kv_scope="head"),
    "gradients_are_the_estimators": InterventionConfig([1], [0], "ov", "mean", "ste", strength=0.5),
    "frozen_values_reach_their_readers": InterventionConfig([1], [0], "ov", kv_scope="head"),
    "frozen_queries_and_keys_reach_their_readers": InterventionConfig([1], [0], "k"),
    "other_heads_are_untouched": InterventionConfig([1], [0], "q", "mean"),
    "cached_equals_recomputed": InterventionConfig([1], [0], "q"),
    "earlier_layers_are_untouched": InterventionConfig([0], [0], "q"),
    "generators_are_untouched": InterventionConfig([0], [0], "q", "mean"),
}
"""Claims that draw several freezes for one example, or some more often than others, and one that they may be about."""


@pytest.mark.parametrize("about", SEVERAL)
def test_of_what_is_stated_nothing_else_is_tried(model: PreTrainedModel, about: str) -> None:
    engine = Everything()
    engine.freeze = contextmanager(yielding(engine.freeze))
    (finding,) = checks.check(about, model, engine, SEVERAL[about], examples=2)
    assert finding.outcome == "passed"
    assert asked(engine) == [SEVERAL[about]] * len(engine.asked)


@pytest.mark.parametrize("about", SEVERAL)
def test_a_function_that_takes_one_config_is_tried(model: PreTrainedModel, about: str) -> None:
    (finding,) = checks.check(about, model, freeze, examples=2)
    assert (finding.outcome, finding.examples > 0) == ("passed", True)


def asked(engine: Everything) -> list[InterventionConfig]:
    """The configs, one of each call."""
    return [config for one in engine.asked for config in (one if isinstance(one, list) else [one])]


def yielding(freeze: Callable[..., object]) -> Callable[..., Iterator[PreTrainedModel]]:
    def frozen(model: PreTrainedModel, config: object) -> Iterator[PreTrainedModel]:
        with freeze(model, config):
            yield model

    return frozen


def test_strategies_draw_what_the_function_is_made_for(model: PreTrainedModel) -> None:
    engine = Everything()
    engine.freeze = contextmanager(yielding(engine.freeze))
    served = configs(model, circuit=st.just("ov"), freeze_type=st.just("zero"))
    inputs = batches(model, rows=st.just(2))
    findings = checks.check_independence(model, engine, served, inputs, examples=4)
    assert outcomes(findings) == {"qk_leaves_ov": "n/a", "ov_leaves_qk": "passed", "order_does_not_matter": "passed"}
    assert {config.freeze_type for config in asked(engine)} == {"zero"}
    assert len({str(config) for config in asked(engine)}) > 4


@pytest.mark.parametrize(
    ("about", "config", "batch"),
    [
        ("qk_leaves_ov", InterventionConfig([0], [0], "ov"), None),
        ("zero_strength_is_unfrozen", InterventionConfig([0], [0], strength=0.5), None),
        ("rows_do_not_matter", InterventionConfig([0], [0], freeze_type="mean"), None),
        ("rows_do_not_matter", InterventionConfig([0], [0]), Batch.of_tokens(IDS[:1])),
        ("later_tokens_do_not_matter", InterventionConfig([0], [0]), Batch.of_tokens(IDS[:, :1])),
        ("frozen_queries_and_keys_reach_their_readers", InterventionConfig([0], [0], "q"), Batch(IDS, IDS > 3)),
        ("several_freezes_win_in_order", InterventionConfig([0], [0]), None),
        ("statistics_are_of_the_real_tokens", InterventionConfig([0], [0]), None),
        ("noise_is_standard_normal", InterventionConfig([0], [0]), None),
    ],
)
def test_a_claim_about_something_else_is_no_pass(
    model: PreTrainedModel, about: str, config: InterventionConfig, batch: Batch | None
) -> None:
    with pytest.raises(checks.NothingChecked, match=f"nothing about {about} could be checked:\n  {about} "):
        checks.check(about, model, freeze, config, batch, examples=3)


def test_one_claim_that_passes_is_enough_of_several(model: PreTrainedModel) -> None:
    findings = checks.check_grouping(model, freeze, InterventionConfig([0], [1], "ov"), examples=3)
    assert outcomes(findings) == {
        "frozen_values_reach_their_readers": "passed",
        "frozen_queries_and_keys_reach_their_readers": "n/a",
    }


def test_what_the_function_refuses_is_told(model: PreTrainedModel) -> None:
    def picky(model: PreTrainedModel, config: InterventionConfig) -> object:
        if config.circuit != "ov":
            raise UnsupportedModelError("only OV is offered here")
        return freeze(model, config)

    assert outcomes(checks.check_ov_leaves_qk(model, picky, examples=5)) == {"ov_leaves_qk": "passed"}
    with pytest.raises(checks.NothingChecked, match=r"qk_leaves_ov \(refused\): only OV is offered here"):
        checks.check_qk_leaves_ov(model, picky, examples=5)


def test_what_an_engine_does_not_offer_is_no_pass(model: PreTrainedModel) -> None:
    class Narrow(Everything):
        not_offered = MappingProxyType({"rows_do_not_matter": "rows are run together here"})

        def supports(self, model: PreTrainedModel, config: InterventionConfig) -> str | None:
            return None if str(config.circuit) == "ov" else "only OV is offered here"

    with pytest.raises(checks.NothingChecked, match=r"rows_do_not_matter \(not offered\): rows are run together"):
        checks.check_rows_do_not_matter(model, Narrow())
    with pytest.raises(checks.NothingChecked, match=r"qk_leaves_ov \(not offered\): only OV is offered here"):
        checks.check_qk_leaves_ov(model, Narrow(), examples=5)


def test_the_seed_decides_what_is_drawn(model: PreTrainedModel) -> None:
    def drawn(seed: int) -> list[str]:
        engine = Everything()
        engine.freeze = contextmanager(yielding(engine.freeze))
        checks.check_generators_are_untouched(model, engine, examples=5, seed=seed)
        return list(map(str, engine.asked))

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


class Mine:
    """Zeroes z of one head of a GPT-2 by a hook, which may stay."""

    def __init__(self, model: PreTrainedModel, layer: int, head: int, leaves: bool = False) -> None:
        self.module = model.transformer.h[layer].attn.c_proj
        self.head = head
        self.leaves = leaves

    def __enter__(self) -> None:
        def zero(module: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            heads = args[0].unflatten(-1, (4, -1)).clone()
            heads[..., self.head, :] = 0
            return (heads.flatten(-2),)

        self.handle = self.module.register_forward_pre_hook(zero)

    def __exit__(self, *error: object) -> None:
        if not self.leaves:
            self.handle.remove()


def test_a_fixed_intervention_is_held_to_what_it_states(model: PreTrainedModel) -> None:
    mine = checks.fixed(lambda model: Mine(model, 1, 2), InterventionConfig([1], [2], "ov"))
    for about in ("removal", "locality", "state", "caching", "independence"):
        assert "passed" in outcomes(checks.check(about, model, mine, examples=2)).values()
    found = outcomes(checks.check_independence(model, mine, examples=2))
    assert found == {"qk_leaves_ov": "n/a", "ov_leaves_qk": "passed", "order_does_not_matter": "n/a"}


def test_a_fixed_intervention_that_does_something_else_is_broken(model: PreTrainedModel) -> None:
    other = checks.fixed(lambda model: Mine(model, 1, 3), InterventionConfig([1], [2], "ov"))
    with pytest.raises(ClaimBroken, match=r"z off by .*\n  at: layer 1, head 3"):
        checks.check_other_heads_are_untouched(model, other, examples=5)
    early = checks.fixed(lambda model: Mine(model, 0, 2), InterventionConfig([1], [2], "ov"))
    with pytest.raises(ClaimBroken, match="layers before the frozen one are untouched"):
        checks.check_earlier_layers_are_untouched(model, early, examples=5)
    leaves = checks.fixed(lambda model: Mine(model, 1, 2, leaves=True), InterventionConfig([1], [2]))
    with pytest.raises(ClaimBroken, match="traces"):
        checks.check_removal_leaves_no_trace(tiny_model("gpt2"), leaves, examples=5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"about": "independense"}, "about='independense': .*did you mean independence?"),
        ({"about": "xyz"}, "about='xyz': .*; there are caching, calibration"),
        ({"freeze": 3}, r"freeze=3: must be a function freeze\(model, config\)"),
        ({"config": 3}, "config=3: must be an InterventionConfig"),
        ({"batch": IDS}, "batch=tensor.*: must be a Batch of pytest_circuitfreeze.strategies"),
        ({"examples": 0}, "examples=0: must be an int of 1 or more"),
        ({"examples": True}, "examples=True: must be an int of 1 or more"),
    ],
)
def test_arguments_that_are_none_are_errors(model: PreTrainedModel, arguments: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"(?s){message}"):
        checks.check(**{"about": "removal", "model": model, "freeze": freeze, **arguments})


def test_a_reference_needs_its_inputs(model: PreTrainedModel) -> None:
    reference = FREEZER.record(model, {"input_ids": IDS})
    config = InterventionConfig([0], [1], "qk", "reference", reference=reference)
    with pytest.raises(ValueError, match="batch=None: a config with a reference is for inputs of its shape"):
        checks.check_qk_leaves_ov(model, freeze, config)
    (finding,) = checks.check_qk_leaves_ov(model, freeze, config, Batch.of_tokens(IDS), examples=2)
    assert finding.outcome == "passed"


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model: GPT2LMHeadModel is in training mode; call model.eval\(\) first"):
        checks.check_removal(tiny_model("gpt2").train(), freeze)


def test_a_name_that_is_none_is_an_error(model: PreTrainedModel) -> None:
    with pytest.raises(AttributeError, match="has no attribute 'chekc_removal'"):
        _ = checks.chekc_removal
    with pytest.raises(ValueError, match="did you mean removal"):
        checks.check_remval(model, freeze)


def test_importing_the_checks_imports_no_suite() -> None:
    # A conftest.py does so before the options are read that the suites depend on.
    look = (
        "import sys; from pytest_circuitfreeze.checks import check_removal; "
        "sys.exit(any(name.startswith(('torch', 'pytest_circuitfreeze.suites')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", look], check=False).returncode == 0
