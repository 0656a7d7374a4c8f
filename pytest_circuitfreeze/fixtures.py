"""The fixtures of the plugin, of session scope so that they may stand beside Hypothesis's ``@given``."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest

from pytest_circuitfreeze.engines import Engine, EngineError, load_engine
from pytest_circuitfreeze.loading import ModelLoadError, build_model, load_model
from pytest_circuitfreeze.preconditions import unusable
from pytest_circuitfreeze.results import CircuitRecord
from pytest_circuitfreeze.settings import Settings, settings_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from freeze_core import AttentionCircuitFreezer

RECORD = pytest.StashKey[CircuitRecord]()


# The exception class of pytest.fail is an attribute of a function, which the type checker does not take for a class.
class UnusableModelError(pytest.fail.Exception):  # type: ignore[name-defined, misc]
    """A model of `--circuitfreeze-model` that the suites cannot run: one error, which is not about any claim."""

    __module__ = "builtins"  # as pytest's own: messages start with the bare name


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each chosen model, for the shipped tests and for a project's own alike."""
    if "circuit_model" in metafunc.fixturenames:
        targets = settings_of(metafunc.config).targets
        metafunc.parametrize("circuit_model", targets, ids=targets, indirect=True, scope="session")


@pytest.fixture(scope="session")
def circuit_model(request: pytest.FixtureRequest, circuit_engine: Engine) -> torch.nn.Module:
    """Each chosen model in turn, in eval mode: tiny architectures and those of `--circuitfreeze-model`.

    A model that cannot be loaded, or one of `--circuitfreeze-model` that the engine cannot serve, is an error of each
    test that asks for it. A tiny architecture that the engine refuses is handed over: freezing it says why.
    """
    settings = settings_of(request.config)
    try:
        model = _load(request.param, settings)
    except ModelLoadError as error:
        pytest.fail(str(error), pytrace=False)
    reason = refusal(circuit_engine, model) if request.param in settings.models else None
    if reason is not None:
        pytest.fail(f"engine {circuit_engine.name!r} cannot serve model {request.param!r}: {reason}", pytrace=False)
    return model


def refusal(engine: Engine, model: torch.nn.Module) -> str | None:
    """Why an engine cannot serve a model at all, if it says so."""
    from freeze_core import InterventionConfig

    refuses, supports = (getattr(engine, name, None) for name in ("refuses", "supports"))
    reason: str | None = refuses(model) if refuses else None
    return reason or (supports(model, InterventionConfig()) if supports else None)


def _load(target: str, settings: Settings) -> torch.nn.Module:
    import torch

    from pytest_circuitfreeze.architectures import Unbuilt
    from pytest_circuitfreeze.models import tiny_model

    dtype: torch.dtype | None = getattr(torch, settings.dtype) if settings.dtype else None
    if target in settings.architectures:
        try:
            tiny: torch.nn.Module = tiny_model(target, dtype=dtype, device=settings.device, attn=settings.attn)
        except ValueError as error:
            if settings.every_type:  # the list of types is transformers', and some need packages that are not there
                return cast("torch.nn.Module", Unbuilt(str(error)))
            raise ModelLoadError(str(error)) from error
        return tiny
    factory = settings.factories.get(target)
    if factory is not None:
        model = build_model(target, factory, dtype=dtype, device=settings.device, attn=settings.attn)
    else:
        model = load_model(target, dtype=dtype, device=settings.device, attn=settings.attn)
    reason = unusable(model) if settings.enabled else None  # a project's own tests may run it in another way
    if reason is not None:
        raise UnusableModelError(f"model {target!r} cannot be validated: {reason}", pytrace=False)
    return model


@pytest.fixture(scope="session")
def circuit_engine(request: pytest.FixtureRequest) -> Engine:
    """The implementation under test (`--circuitfreeze-engine`), one instance for the whole run."""
    try:
        return load_engine(settings_of(request.config).engine)
    except EngineError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture(scope="session")
def circuit_record(request: pytest.FixtureRequest) -> CircuitRecord:
    """Takes what a check returns, `circuit_record.observe(check_...(...))`, into the report of the test."""
    return request.config.stash[RECORD]


@pytest.fixture(scope="session")
def freezer() -> AttentionCircuitFreezer:
    """An AttentionCircuitFreezer with its default settings."""
    from freeze_core import AttentionCircuitFreezer

    return AttentionCircuitFreezer()


@pytest.fixture(scope="session")
def tiny_gpt2() -> PreTrainedModel:
    """A tiny GPT-2, fused projections, 3 layers of random weights; shared, leave it as it was."""
    return _tiny("gpt2")


@pytest.fixture(scope="session")
def tiny_llama() -> PreTrainedModel:
    """A tiny LLaMA, separate projections, one KV head a query head; shared, leave it as it was."""
    return _tiny("llama")


@pytest.fixture(scope="session")
def tiny_mistral_gqa() -> PreTrainedModel:
    """A tiny Mistral, separate projections, several query heads a KV head; shared, leave it as it was."""
    return _tiny("mistral_gqa")


@pytest.fixture(scope="session")
def tiny_falcon_mqa() -> PreTrainedModel:
    """A tiny Falcon, fused projection, one KV head for all query heads; shared, leave it as it was."""
    return _tiny("falcon_mqa")


def _tiny(name: str) -> PreTrainedModel:
    from pytest_circuitfreeze.models import tiny_model

    return tiny_model(name)
