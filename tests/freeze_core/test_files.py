"""A config in a file: what was saved is what is loaded, and what is no config is refused by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from freeze_core import AttentionCircuitFreezer, InterventionConfig, InterventionError
from freeze_core.files import write_file
from pytest_circuitfreeze.models import tiny_model

IDS = torch.tensor([[7, 3, 11, 5], [4, 19, 6, 23]])
INDICES = st.none() | st.lists(st.integers(-4, 3), min_size=1, unique=True) | st.just(range(2))


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other


def demand_the_same(loaded: InterventionConfig, config: InterventionConfig) -> None:
    for field in dataclasses.fields(config):
        old, new = (getattr(each, field.name) for each in (config, loaded))
        if hasattr(old, "tensors"):
            assert old.tensors().keys() == new.tensors().keys()
            assert all(same(new.tensors()[name], tensor) for name, tensor in old.tensors().items())
            assert list(old) == list(new)
            assert vars(new).keys() == vars(old).keys()
            assert all(same(vars(old)[name], vars(new)[name]) for name in vars(old) if name != "_layers")
        else:
            assert (list(old) if isinstance(old, range) else old) == new


@given(st.data())
def test_what_was_saved_is_loaded(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    config = data.draw(
        st.builds(
            InterventionConfig,
            layer_indices=INDICES,
            head_indices=INDICES,
            circuit=st.sampled_from(["qk", "ov", "both", "q", "k", "v"]),
            freeze_type=st.sampled_from(["zero", "mean", "noise", "resample"]),
            backward_mode=st.sampled_from(["stopgrad", "ste", "circuit_ste"]),
            preserve_gradients=st.booleans(),
            kv_scope=st.sampled_from(["group", "head"]),
            strength=st.floats(0, 1),
            seed=st.integers(),
            noise_std=st.none() | st.floats(0, 9),
            attention=st.sampled_from(["self", "cross", "encoder"]),
        )
    )
    path = tmp_path_factory.getbasetemp() / "config.safetensors"
    config.save(path)
    demand_the_same(InterventionConfig.load(path), config)


@pytest.fixture
def held() -> InterventionConfig:
    model = tiny_model("gpt2")
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    recording = AttentionCircuitFreezer().record(model, {"input_ids": IDS, "attention_mask": mask}, pattern=True)
    return InterventionConfig([0, -1], [1], "qk", "reference", reference=recording)


def test_a_recording_is_in_the_file(tmp_path: Path, held: InterventionConfig) -> None:
    held.save(tmp_path / "config")
    loaded = InterventionConfig.load(tmp_path / "config")
    demand_the_same(loaded, held)
    model, frozen = tiny_model("gpt2"), []
    for config in (held, loaded):
        with AttentionCircuitFreezer().freeze_circuits(model, config):
            mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
            frozen.append(model(input_ids=IDS.flip(0), attention_mask=mask).logits)
    assert torch.equal(*frozen)


def test_statistics_are_in_the_file(tmp_path: Path) -> None:
    statistics = AttentionCircuitFreezer().calibrate(tiny_model("llama_gqa"), [IDS], layers=[1], progress=False)
    config = InterventionConfig([1], freeze_type="mean", statistics=statistics)
    config.save(tmp_path / "config")
    demand_the_same(InterventionConfig.load(tmp_path / "config"), config)


def test_what_cannot_be_written_leaves_the_former_file(tmp_path: Path, held: InterventionConfig) -> None:
    path = tmp_path / "config"
    InterventionConfig().save(path)
    before = path.read_bytes()
    held.strength = 2.0
    with pytest.raises(InterventionError, match=r"strength=2\.0"):
        held.save(path)
    with pytest.raises(TypeError):
        write_file(path, "kind", {}, {"fact": 3})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_config_is_refused(tmp_path: Path, held: InterventionConfig) -> None:
    path = tmp_path / "config"
    with pytest.raises(InterventionError, match=r"config of .*config: cannot be read as safetensors"):
        InterventionConfig.load(path)
    path.write_bytes(b"\x80\x04}\x94.")  # a pickle
    with pytest.raises(InterventionError, match="cannot be read as safetensors"):
        InterventionConfig.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(InterventionError, match="format None, must be 'circuitfreeze-config-1'"):
        InterventionConfig.load(path)
    held.save(path)
    whole = load_file(path)
    facts = {"config": '{"freeze_type": "reference", "attention": "self", "strength": 3}'}
    for tensors, given_facts, message in (
        (whole, facts, r"not what save writes \(strength=3"),
        ({}, {"config": '{"freeze_type": "zero", "colour": 1}'}, "colour"),
        (whole, {"config": '{"freeze_type": "zero"}'}, "which no field of this config has"),
        (whole, {}, "'config'"),
        (whole, {"config": "3"}, "int"),
        ({name: whole[name] for name in whole if not name.endswith(".k")}, facts, "'k'"),
    ):
        write_file(path, "circuitfreeze-config-1", tensors, given_facts)
        with pytest.raises(InterventionError, match=message):
            InterventionConfig.load(path)


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path):
    (tmp_path / "deep").mkdir()
    link = tmp_path / "link.safetensors"
    link.symlink_to(tmp_path / "deep" / "there.safetensors")
    InterventionConfig([0], [1]).save(link)
    assert link.is_symlink()
    assert InterventionConfig.load(tmp_path / "deep" / "there.safetensors").head_indices == [1]
