"""Every check accepts honest engines and refuses engines that are broken on purpose."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_engines import BROKEN
from honest_engine import HookEngine
from transformers import PreTrainedModel

import pytest_circuitfreeze.suites
from freeze_core import InterventionConfig
from pytest_circuitfreeze.engines import Engine, FreezeCore
from pytest_circuitfreeze.models import tiny_model
from pytest_circuitfreeze.recordings import calibrated, recorded
from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.claims import ClaimBroken, Margin
from pytest_circuitfreeze.suites.judge.twins import twins
from pytest_circuitfreeze.suites.tolerance import nudged

SUBJECTS = [
    *("caching", "calibration", "gradients", "grouping", "hooks", "independence", "locality", "noise", "references"),
    *("removal", "resampling", "state", "storage", "unservable", "values"),
]
CHECKS: dict[str, Callable[..., Margin]] = {
    name: check
    for subject in SUBJECTS
    for name, check in vars(import_module(f"pytest_circuitfreeze.suites.{subject}")).items()
    if name.startswith("check_")
}

IDS = torch.tensor([[7, 3, 11, 5, 2, 13, 17, 1], [4, 19, 6, 23, 8, 29, 10, 31]])
PADDED = Batch(IDS, torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]]))
LEFT = Batch(IDS, torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1]]))
WHOLE = Batch(IDS)


@cache
def model(name: str) -> PreTrainedModel:
    return tiny_model(name)


def freeze(**fields: Any) -> InterventionConfig:
    return InterventionConfig(**{"layer_indices": [1], "head_indices": [1], **fields})


def one(check: str, name: str, config: Any, batch: Batch = PADDED, **more: Any) -> Callable[[Engine], Margin]:
    return lambda engine: CHECKS[check](engine, model(name), config, batch, **more)


def each(
    check: str, name: str, configs: Sequence[Any], batch: Batch = PADDED, **more: Any
) -> list[Callable[[Engine], Margin]]:
    return [one(check, name, config, batch, **more) for config in configs]


OTHER = Batch((IDS + 11) % 31, PADDED.attention_mask)


def held(name: str, source: Batch = OTHER, **fields: Any) -> InterventionConfig:
    """A freeze to what was recorded on `source`."""
    return freeze(freeze_type="reference", reference=recorded(model(name), source), **fields)


def measured(name: str, freeze_type: str = "mean", foreign: bool = False, **fields: Any) -> InterventionConfig:
    """A freeze to statistics that were calibrated on another batch, of the model itself or of a copy a little off."""
    source = nudged(model(name)) if foreign else model(name)
    statistics = calibrated(source, [OTHER, Batch(IDS[:, :3])])
    return freeze(freeze_type=freeze_type, statistics=statistics, **fields)


def unservable(name: str, config: Callable[[], InterventionConfig], batch: Batch, cached: int = 0) -> Any:
    check = CHECKS["check_what_cannot_be_served_is_an_error"]
    return lambda engine: check(engine, model(name), config(), batch, cached)


BOTH_SCOPES = [{"kv_scope": "group"}, {"kv_scope": "head"}]

CASES: Mapping[str, Sequence[Callable[[Engine], Margin]]] = {
    "check_values_are_the_oracles": [
        *each(
            "check_values_are_the_oracles",
            "llama_gqa",
            [
                [freeze()],
                [freeze(circuit="q", strength=0.5)],
                [freeze(freeze_type="mean", kv_scope="head")],
                [freeze(freeze_type="noise"), freeze(freeze_type="noise", noise_std=2.0, seed=3, head_indices=[3])],
                [freeze(strength=0.5), freeze(circuit="qk", freeze_type="mean", strength=0.5)],
                [freeze(strength=0.99999)],
            ],
        ),
        *(
            lambda engine, make=make, batch=batch: CHECKS["check_values_are_the_oracles"](
                engine, model("llama_gqa"), [make()], batch
            )
            for make, batch in (
                (lambda: held("llama_gqa"), PADDED),
                (lambda: held("llama_gqa", strength=0.5, kv_scope="head"), PADDED),
                (lambda: held("llama_gqa", Batch(IDS[1:] + 1), circuit="qk"), WHOLE),
                (lambda: freeze(freeze_type="resample", seed=3), WHOLE),
                (lambda: measured("llama_gqa", kv_scope="head"), PADDED),
                (lambda: measured("llama_gqa", "noise", seed=5, strength=0.5), PADDED),
            )
        ),
        one("check_values_are_the_oracles", "falcon_mha", [freeze(circuit="ov", freeze_type="mean")], attn="eager"),
    ],
    "check_zero_strength_is_unfrozen": each("check_zero_strength_is_unfrozen", "gpt2", [freeze(strength=0.0)]),
    "check_full_strength_replaces_anything": [
        one("check_full_strength_replaces_anything", name, config, poison=poison)
        for name in ("llama_gqa", "falcon_mha", "gpt2")
        for poison in (float("nan"), float("inf"))
        for config in (freeze(), freeze(freeze_type="noise", noise_std=1.0, backward_mode="ste"))
    ],
    "check_implementations_agree": each("check_implementations_agree", "llama", [freeze(), freeze(freeze_type="mean")]),
    "check_noise_is_standard_normal": [
        lambda engine: CHECKS["check_noise_is_standard_normal"](engine, model("llama_gqa"), 5)
    ],
    "check_noise_depends_on_its_place_alone": each(
        "check_noise_depends_on_its_place_alone", "opt", [freeze(freeze_type="noise", circuit="ov", seed=-2)]
    ),
    "check_cached_equals_recomputed": [
        case
        for name in ("llama_gqa", "gpt2")
        for scope in BOTH_SCOPES
        for case in each(
            "check_cached_equals_recomputed",
            name,
            [
                freeze(strength=0.5, **scope),
                freeze(freeze_type="mean", **scope),
                freeze(freeze_type="noise", **scope),
                freeze(freeze_type="noise", noise_std=1.0, circuit="ov", **scope),
            ],
            LEFT,
            ends=[4, 6, 7, 8],
        )
    ],
    "check_foreign_caches_are_recognised": each(
        "check_foreign_caches_are_recognised", "llama_gqa", [freeze(**scope) for scope in BOTH_SCOPES], end=5
    ),
    "check_recomputation_is_the_same_pass": each(
        "check_recomputation_is_the_same_pass",
        "llama_gqa",
        [freeze(freeze_type="noise", noise_std=1.0, backward_mode="ste", **scope) for scope in BOTH_SCOPES],
        other=Batch(IDS[:, :5] + 1),
    ),
    "check_qk_leaves_ov": each("check_qk_leaves_ov", "llama_gqa", [freeze(circuit="qk", **s) for s in BOTH_SCOPES]),
    "check_ov_leaves_qk": each("check_ov_leaves_qk", "llama_gqa", [freeze(circuit="ov", **s) for s in BOTH_SCOPES]),
    "check_order_does_not_matter": each("check_order_does_not_matter", "gpt2", [freeze(freeze_type="mean")]),
    "check_other_heads_are_untouched": each(
        "check_other_heads_are_untouched", "mistral_gqa", [freeze(**scope) for scope in BOTH_SCOPES]
    ),
    "check_earlier_layers_are_untouched": each("check_earlier_layers_are_untouched", "falcon_mqa", [freeze()]),
    "check_later_tokens_do_not_matter": each(
        "check_later_tokens_do_not_matter", "llama", [freeze(), freeze(freeze_type="noise", noise_std=1.0)], column=5
    ),
    "check_rows_do_not_matter": each("check_rows_do_not_matter", "gpt2", [freeze()]),
    "check_frozen_values_reach_their_readers": each(
        "check_frozen_values_reach_their_readers", "llama_gqa", [freeze(circuit="v", **scope) for scope in BOTH_SCOPES]
    ),
    "check_frozen_queries_and_keys_reach_their_readers": [
        case
        for circuit in ("q", "k", "qk")
        for case in each(
            "check_frozen_queries_and_keys_reach_their_readers",
            "mistral_gqa",
            [freeze(circuit=circuit, **scope) for scope in BOTH_SCOPES],
            WHOLE,
        )
    ],
    "check_storage_does_not_matter": [
        lambda engine, name=name, number=number, mode=mode: CHECKS["check_storage_does_not_matter"](
            engine, model(name), twins(model(name))[number], freeze(backward_mode=mode, strength=0.5), PADDED
        )
        for name, number in (("gpt2", 0), ("gpt2", 1), ("llama", 0), ("falcon_mha", 0))
        for mode in ("stopgrad", "ste")
    ],
    "check_gradients_are_the_estimators": [
        case
        for name in ("gpt2", "llama_gqa")
        for case in each(
            "check_gradients_are_the_estimators",
            name,
            [
                [freeze()],
                [freeze(backward_mode="ste")],
                [freeze(strength=0.25, freeze_type="mean")],
                [freeze(strength=0.99999)],
                [
                    freeze(strength=0.25, backward_mode="ste"),
                    freeze(head_indices=None, circuit="q", freeze_type="noise"),
                ],
                [freeze(backward_mode="circuit_ste", circuit="qk", head_indices=None)],
                [freeze(backward_mode="circuit_ste", strength=0.25, freeze_type="mean", kv_scope="head")],
                [freeze(strength=0.5), freeze(backward_mode="circuit_ste", circuit="v", head_indices=None)],
                [freeze(backward_mode="circuit_ste", circuit="q"), freeze(freeze_type="mean", circuit="ov")],
            ],
        )
    ],
    "check_backward_modes_share_the_forward": each(
        "check_backward_modes_share_the_forward", "llama_gqa", [freeze(), freeze(strength=0.5, circuit="qk")]
    ),
    "check_recordings_are_what_attention_saw": [
        lambda engine, name=name, source=source: CHECKS["check_recordings_are_what_attention_saw"](
            model(name), getattr(engine, "recorded", recorded)(model(name), source)
        )
        for name in ("llama_gqa", "falcon_mqa")
        for source in (PADDED, WHOLE)
    ],
    "check_patterns_are_the_recorded": [
        lambda engine, make=make, batch=batch: CHECKS["check_patterns_are_the_recorded"](
            engine, model("llama_gqa"), make(), batch
        )
        for make, batch in (
            (lambda: held("llama_gqa", circuit="qk"), PADDED),
            (lambda: held("llama_gqa", Batch(IDS[1:] + 1), circuit="both", kv_scope="head"), WHOLE),
        )
    ],
    "check_resampling_takes_other_rows": [
        lambda engine, name=name, rows=rows: CHECKS["check_resampling_takes_other_rows"](engine, model(name), -7, rows)
        for name in ("llama_gqa", "gpt2")
        for rows in (2, 4)
    ],
    "check_statistics_are_of_the_real_tokens": [
        lambda engine: CHECKS["check_statistics_are_of_the_real_tokens"](
            model("gpt2"), getattr(engine, "calibrated", calibrated)(model("gpt2"), [PADDED, Batch(IDS[:1, :3])])
        )
    ],
    "check_what_cannot_be_served_is_an_error": [
        unservable("llama_gqa", lambda: held("llama_gqa", Batch(IDS[:, :7])), WHOLE),
        unservable("llama_gqa", lambda: held("llama_gqa", WHOLE), Batch(IDS[:, :7])),
        unservable("llama_gqa", lambda: held("llama_gqa", WHOLE), Batch(IDS.repeat(2, 1))),
        unservable("llama_gqa", lambda: held("llama_gqa"), WHOLE),
        unservable("llama_gqa", lambda: held("llama_gqa", WHOLE), PADDED),
        unservable("llama_gqa", lambda: freeze(freeze_type="resample"), PADDED),
        unservable("llama_gqa", lambda: freeze(freeze_type="resample"), Batch(IDS[:1])),
        unservable("llama_gqa", lambda: freeze(freeze_type="mean"), WHOLE, 7),
        unservable("llama_gqa", lambda: freeze(freeze_type="noise"), PADDED, 5),
        unservable("llama_gqa", lambda: measured("llama_gqa", foreign=True), PADDED),
    ],
    "check_hooks_of_others_stay": each(
        "check_hooks_of_others_stay", "llama_gqa", [freeze(**scope) for scope in BOTH_SCOPES]
    ),
    "check_removal_leaves_no_trace": each(
        "check_removal_leaves_no_trace", "llama_gqa", [freeze(**s) for s in BOTH_SCOPES]
    ),
    "check_error_in_body_leaves_no_trace": each("check_error_in_body_leaves_no_trace", "llama_gqa", [freeze()]),
    "check_error_in_forward_leaves_no_trace": each("check_error_in_forward_leaves_no_trace", "gpt2", [freeze()]),
    "check_freezes_can_be_repeated": each(
        "check_freezes_can_be_repeated", "llama_gqa", [freeze(freeze_type="mean")], other=Batch(IDS[:, :3] + 1)
    ),
    "check_nesting_is_a_list": each(
        "check_nesting_is_a_list", "llama_gqa", [[freeze(), freeze(freeze_type="mean"), freeze(layer_indices=[0])]]
    ),
    "check_parameters_are_untouched": each("check_parameters_are_untouched", "falcon_mqa", [freeze()], training=True),
    "check_generators_are_untouched": each("check_generators_are_untouched", "gpt2", [freeze(freeze_type="noise")]),
    "check_inputs_are_not_written_to": each("check_inputs_are_not_written_to", "llama", [freeze()], PADDED),
}


def test_each_check_has_cases_and_broken_engines() -> None:
    assert set(CASES) == set(CHECKS)
    assert set(BROKEN) == set(CHECKS)


def test_each_subject_is_looked_through() -> None:
    folder = Path(inspect.getfile(pytest_circuitfreeze.suites)).parent
    assert {path.stem.removeprefix("test_") for path in folder.glob("test_*.py")} == set(SUBJECTS)


@pytest.mark.parametrize("make", [HookEngine, FreezeCore])
@pytest.mark.parametrize("check", CASES)
def test_honest_engine_is_accepted(check: str, make: Callable[[], Engine]) -> None:
    for case in CASES[check]:
        margin = case(make())
        assert 0 <= margin.error <= margin.bound


@pytest.mark.parametrize(
    ("check", "broken"), [(check, broken) for check, several in BROKEN.items() for broken in several]
)
def test_broken_engine_is_refused(check: str, broken: type[HookEngine]) -> None:
    def run_all() -> None:
        for case in CASES[check]:
            case(broken())

    try:
        with pytest.raises(ClaimBroken):
            run_all()
    finally:
        model.cache_clear()  # it may have left its mark on them
