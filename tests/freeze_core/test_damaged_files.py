"""A saved file that was damaged is refused when it is loaded; one of an earlier version, without a digest, is read."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from freeze_core import (
    AblationStudy,
    AttentionCircuitFreezer,
    Faithfulness,
    HeadScores,
    InterventionConfig,
    InterventionError,
    PatchingStudy,
    measure_faithfulness,
    patch_activations,
    run_circuit_ablation_study,
    score_heads,
)
from freeze_core.files import DIGEST
from freeze_core.statistics import ActivationStatistics
from pytest_circuitfreeze.models import tiny_model

IDS = torch.arange(14).view(2, 7) * 5 % 97
FREEZER = AttentionCircuitFreezer()


def sweep(path):
    score_heads(tiny_model("gpt2"), IDS, "loss", layers=[1], circuits=["ov"], progress=False, checkpoint=path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A file of each kind."""
    folder, model = tmp_path_factory.mktemp("saved"), tiny_model("gpt2")
    statistics = FREEZER.calibrate(model, [IDS], progress=False)
    statistics.save(folder / "statistics")
    InterventionConfig(freeze_type="mean", statistics=statistics).save(folder / "config")
    InterventionConfig(freeze_type="reference", reference=FREEZER.record(model, IDS)).save(folder / "recording")
    few = {"progress": False, "resamples": 100}
    run_circuit_ablation_study(model, IDS, [0], [1], circuits=["ov"], **few).save(folder / "ablation")
    patch_activations(model, IDS, IDS + 1, "logit_difference", targets=(3, 4), layers=[1], circuits=["z"], **few).save(
        folder / "patching"
    )
    sweep(folder / "sweep")
    score_heads(model, IDS, "loss", layers=[1], circuits=["ov"], progress=False).save(folder / "scores")
    measure_faithfulness(model, IDS, {0: [1]}, "logit_difference", targets=(3, 4), **few).save(folder / "faithfulness")
    return folder


LOADERS = {
    "statistics": ActivationStatistics.load,
    "config": InterventionConfig.load,
    "recording": InterventionConfig.load,
    "ablation": AblationStudy.load,
    "patching": PatchingStudy.load,
    "sweep": sweep,
    "scores": HeadScores.load,
    "faithfulness": Faithfulness.load,
}


def header(raw):
    return 8 + struct.unpack("<Q", raw[:8])[0]


def first_fact(raw):
    """The place of a letter in the value of a fact."""
    facts = json.loads(raw[8 : header(raw)])["__metadata__"]
    name = next(name for name in sorted(facts) if name != "format")
    return raw.index(json.dumps(name).encode()) + len(name) + 6


def with_bytes(raw, place, change):
    return raw[:place] + bytes([change(raw[place])]) + raw[place + 1 :]


def resaved(path, change):
    """The same metadata with other tensors, as software that edits the tensors writes it."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        facts = file.metadata()
    name = max(tensors, key=lambda name: tensors[name].numel() * tensors[name].is_floating_point())
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, path, facts)


def nan_in_the_middle(tensor):
    tensor.view(-1)[tensor.numel() // 2] = torch.nan
    return tensor


DAMAGES = {
    "a bit of the first value": lambda raw: with_bytes(raw, header(raw), lambda byte: byte ^ 1),
    "a bit of the last value": lambda raw: with_bytes(raw, len(raw) - 1, lambda byte: byte ^ 64),
    "cut": lambda raw: raw[:-8],
    "longer": lambda raw: raw + bytes(8),
    "a fact": lambda raw: with_bytes(raw, first_fact(raw), lambda byte: byte ^ 2),
    "the digest": lambda raw: with_bytes(raw, raw.index(DIGEST.encode()) + 12, lambda byte: ord("0") + (byte + 1) % 2),
    "the word before the digest": lambda raw: raw.replace(DIGEST.encode(), DIGEST.upper().encode()),
    "a nan": nan_in_the_middle,
    "a number": lambda tensor: tensor.add_(1e-6 if tensor.dtype == torch.float64 else 1e-3),
    "a shape": lambda tensor: tensor.reshape(1, *tensor.shape),
    "a dtype": lambda tensor: tensor.half(),
}
OF_TENSORS = ("a nan", "a number", "a shape", "a dtype")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", LOADERS)
def test_a_damaged_file_is_refused(kind, damage, saved, tmp_path):
    path = tmp_path / "file"
    raw = (saved / kind).read_bytes()
    path.write_bytes(raw if damage in OF_TENSORS else DAMAGES[damage](raw))
    if damage in OF_TENSORS:
        resaved(path, DAMAGES[damage])
    with pytest.raises(InterventionError, match=r"file is damaged|cannot be read as safetensors|format"):
        LOADERS[kind](path)


def without_digest(path):
    """The file as earlier versions wrote it."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        facts = file.metadata()
    save_file(tensors, path, {**facts, "format": facts["format"].partition(DIGEST)[0]})


@pytest.mark.parametrize("kind", LOADERS)
def test_a_file_of_an_earlier_version_is_read(kind, saved, tmp_path):
    path = tmp_path / "file"
    path.write_bytes((saved / kind).read_bytes())
    without_digest(path)
    LOADERS[kind](path)


def test_values_that_no_calibration_gives_are_refused_without_a_digest_too(saved, tmp_path):
    path = tmp_path / "file"
    path.write_bytes((saved / "statistics").read_bytes())
    without_digest(path)
    resaved(path, nan_in_the_middle)
    with pytest.raises(InterventionError, match="not what save writes"):
        ActivationStatistics.load(path)


def test_a_digest_covers_facts_in_any_order(saved, tmp_path):
    """Software that writes metadata in another order has damaged nothing."""
    path = tmp_path / "file"
    raw = (saved / "statistics").read_bytes()
    parts = json.loads(raw[8 : header(raw)])
    parts["__metadata__"] = dict(sorted(parts["__metadata__"].items(), reverse=True))
    text = json.dumps(parts).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[header(raw) :])
    ActivationStatistics.load(Path(path))
