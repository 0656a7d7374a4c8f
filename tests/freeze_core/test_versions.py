"""An error that a newer library can have caused names that library, its version, and the last one that was run."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
import torch
from torch import nn

from freeze_core import (
    AttentionCircuitFreezer,
    FreezeNotInForceError,
    InterventionConfig,
    InterventionError,
    UnsupportedModelError,
    versions,
)
from freeze_core.attention import sites
from pytest_circuitfreeze.models import tiny_model

NEWEST = {"torch": "2.15.0", "transformers": "5.24.0"}
NEWER = "transformers 5.25.0 is newer than 5.24.0, the newest release this version was run with"
IDS = torch.arange(1, 9).view(2, 4)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Pretends that these versions are installed."""

    def pretend(**installed: str) -> None:
        def version(library: str) -> str:
            if library not in installed:
                raise PackageNotFoundError(library)
            return installed[library]

        versions._installed.cache_clear()
        monkeypatch.setattr(versions, "NEWEST_RUN", NEWEST)
        monkeypatch.setattr(versions, "version", version)

    yield pretend
    versions._installed.cache_clear()


@pytest.mark.parametrize(
    ("torch_version", "transformers_version", "libraries"),
    [
        ("2.15.0", "5.24.0", []),
        ("2.13.0+cpu", "5.23.0", []),
        ("2.15.0+cu130", "5.24.0", []),
        ("2.15.0a0+git1234567", "5.24.0rc1", []),
        ("2.9.1", "5.9.0", []),
        ("2.15", "5.24", []),
        ("2.15rc1", "5.24rc2", []),
        ("2.16rc1", "5.24.0", ["torch 2.16rc1"]),
        ("2.15.0", "5.24.1", ["transformers 5.24.1"]),
        ("2.15.0", "5.25.0.dev0", ["transformers 5.25.0.dev0"]),
        ("2.16.0a0+git1234567", "5.24.0", ["torch 2.16.0a0+git1234567"]),
        ("3.0.0", "6.0.0rc1", ["torch 3.0.0", "transformers 6.0.0rc1"]),
    ],
)
def test_only_newer_releases_are_named(
    install: Callable[..., None], torch_version: str, transformers_version: str, libraries: list[str]
) -> None:
    install(torch=torch_version, transformers=transformers_version)
    sentences = versions.newer_than_run().split("; ") if libraries else [versions.newer_than_run()]
    assert [sentence.partition(" is newer than ")[0] for sentence in sentences] == (libraries or [""])


def test_library_without_metadata_is_not_named(install: Callable[..., None]) -> None:
    install(transformers="5.24.0")
    assert versions.newer_than_run() == ""


@pytest.mark.parametrize("kind", [UnsupportedModelError, FreezeNotInForceError])
def test_error_that_a_newer_library_can_cause_names_it_once(
    install: Callable[..., None], kind: type[ValueError]
) -> None:
    install(torch="2.13.0", transformers="5.24.0")
    assert str(kind("layer 0: refused")) == "layer 0: refused"
    install(torch="2.13.0", transformers="5.25.0")
    error = kind("layer 0: refused")
    assert str(error) == f"layer 0: refused ({NEWER})"
    again = kind(f"not all layers can be frozen, {error}; {error}: name others")
    assert str(again) == f"not all layers can be frozen, layer 0: refused; layer 0: refused: name others ({NEWER})"
    assert str(pickle.loads(pickle.dumps(again))) == str(again)


def test_invalid_argument_is_not_blamed_on_a_library(install: Callable[..., None]) -> None:
    install(torch="2.16.0", transformers="5.25.0")
    with pytest.raises(InterventionError) as caught:
        AttentionCircuitFreezer().freeze_circuits(tiny_model("gpt2"), InterventionConfig(head_indices=[99]))
    assert "newer" not in str(caught.value)


def test_refused_model_names_the_newer_library(install: Callable[..., None]) -> None:
    install(torch="2.13.0", transformers="5.25.0")
    with pytest.raises(UnsupportedModelError) as caught:
        AttentionCircuitFreezer().freeze_circuits(nn.Linear(2, 2), InterventionConfig())
    assert str(caught.value).endswith(f"({NEWER})")
    assert str(caught.value).count(NEWER) == 1


def _freeze(model: nn.Module) -> Any:
    return AttentionCircuitFreezer().freeze_circuits(model, InterventionConfig())


def _record(model: nn.Module) -> Any:
    return AttentionCircuitFreezer().record(model, IDS)


def _calibrate(model: nn.Module) -> Any:
    return AttentionCircuitFreezer().calibrate(model, [IDS], progress=False)


ENTRIES = [_freeze, _record, _calibrate, AttentionCircuitFreezer().get_model_config]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.__name__)
@pytest.mark.parametrize("kind", [AttributeError, TypeError, KeyError, IndexError, AssertionError])
def test_unexpected_error_while_looking_for_attention_is_a_refusal(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch, entry: Callable[[nn.Module], Any], kind: type
) -> None:
    def changed(*_: object) -> None:
        raise kind("head_dim")

    model = tiny_model("llama")
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    monkeypatch.setattr(sites, "layout_of", changed)
    install(torch="2.13.0", transformers="5.24.0")
    with pytest.raises(UnsupportedModelError, match=kind.__name__) as caught:
        entry(model)
    assert isinstance(caught.value.__cause__, kind)
    assert "newer" not in str(caught.value)
    install(torch="2.13.0", transformers="5.25.0")
    with pytest.raises(UnsupportedModelError, match=kind.__name__) as caught:
        entry(model)
    assert str(caught.value).endswith(f"({NEWER})")
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def test_running_out_of_memory_is_not_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(sites, "layout_of", allocate)
    with pytest.raises(torch.OutOfMemoryError):
        _freeze(tiny_model("llama"))


class Renamed(nn.Module):
    """A model whose forward takes none of the arguments that a freeze hands over."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_model("llama")

    def forward(self, tokens: torch.Tensor) -> Any:
        return self.model(tokens)


def test_model_that_does_not_take_its_arguments_names_the_newer_library(install: Callable[..., None]) -> None:
    install(torch="2.13.0", transformers="5.25.0")
    with pytest.raises(InterventionError, match="cannot run on") as caught:
        _record(Renamed())
    assert str(caught.value).endswith(f"({NEWER})")
