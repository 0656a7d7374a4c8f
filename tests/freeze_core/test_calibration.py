"""Statistics over a data set: what they are, that they are kept, and whose they are."""

from __future__ import annotations

import resource

import pytest
import torch
from cache_names import CACHE, cache_of
from safetensors.torch import save_file

from freeze_core import AttentionCircuitFreezer, InterventionConfig, InterventionError
from freeze_core.statistics import ActivationStatistics
from pytest_circuitfreeze.models import tiny_model

FREEZER = AttentionCircuitFreezer()


def batches(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        ids = torch.randint(0, 97, (2 + number, 5 + number), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, : number + 1] = 0
        yield {"input_ids": ids, "attention_mask": mask}


def calibrated(model, **kwargs):
    return FREEZER.calibrate(model, batches(), progress=False, **kwargs)


def test_means_and_deviations_are_those_of_all_real_tokens(any_storage):
    statistics = calibrated(any_storage)
    for layer in range(3):
        for role in "qkvz":
            samples = []
            for batch in batches():
                activation = getattr(FREEZER.record(any_storage, batch)[layer], role)
                samples.append(activation[batch["attention_mask"].bool()].double())
            samples = torch.cat(samples)
            torch.testing.assert_close(statistics[layer].mean[role], samples.mean(0), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(
                statistics[layer].std[role], samples.std(0, correction=0), rtol=1e-12, atol=1e-12
            )
    assert statistics.tokens == len(samples)


@pytest.mark.parametrize("scope", ["group", "head"])
def test_a_mean_freeze_holds_the_calibrated_mean_also_when_cached(any_storage, ids, scope):
    statistics = calibrated(any_storage)
    config = InterventionConfig([1], [1], "both", "mean", kv_scope=scope, statistics=statistics)
    with FREEZER.freeze_circuits(any_storage, config), torch.no_grad():
        held = FREEZER.record(any_storage, ids)[1]
        whole = any_storage(ids, use_cache=False).logits
        cache = cache_of(any_storage(ids[:, :5], use_cache=True))
        step = any_storage(ids[:, 5:6], **{CACHE: cache}).logits
    for role in "qkv":
        value, mean = getattr(held, role), statistics[1].mean[role]
        head = 1 if value.shape[2] == 4 else 1 // (4 // value.shape[2])
        origin = head // (value.shape[2] // len(mean))
        assert torch.equal(value[:, :, head], mean[origin].float().expand(2, 7, -1))
    torch.testing.assert_close(step[:, 0], whole[:, 5], rtol=0, atol=32 * 3 * 2**-23 * float(whole.abs().max()))


def test_noise_has_the_calibrated_mean_and_deviation(ids):
    model = tiny_model("llama_gqa")
    statistics = calibrated(model)
    unit = InterventionConfig([0], None, "ov", "noise", noise_std=1.0, seed=3)
    scaled = InterventionConfig([0], None, "ov", "noise", statistics=statistics, seed=3)
    with FREEZER.freeze_circuits(model, unit):
        e = FREEZER.record(model, ids)[0].v
    with FREEZER.freeze_circuits(model, scaled):
        held = FREEZER.record(model, ids)[0].v
    torch.testing.assert_close(held.double(), statistics[0].mean["v"] + statistics[0].std["v"] * e.double())


def test_statistics_are_saved_and_loaded(model, tmp_path, ids):
    statistics = calibrated(model, layers=[0, -1])
    statistics.save(tmp_path / "statistics.safetensors")
    loaded = ActivationStatistics.load(tmp_path / "statistics.safetensors")
    assert list(loaded) == [0, 2]
    assert (loaded.tokens, loaded.identity) == (statistics.tokens, statistics.identity)
    assert all(torch.equal(loaded[2].std[role], statistics[2].std[role]) for role in "qkvz")
    config = InterventionConfig([0], [1], freeze_type="mean", statistics=loaded)
    with FREEZER.freeze_circuits(model.base_model, config):  # the same attention, whichever module it is reached by
        model(ids)


def test_statistics_of_a_layer_are_what_their_values_are():
    first, second = (calibrated(tiny_model("llama_gqa"))[0] for _ in range(2))
    assert first == second
    assert first is not second
    assert hash(first) == hash(second) == hash(first.copied())
    second.std["k"][0, 0] += 1
    assert first != second
    assert first != "statistics"
    assert first.copied() == first


def test_statistics_of_another_model_are_refused(model):
    other = tiny_model("llama", seed=1)
    statistics = calibrated(other)
    with pytest.raises(InterventionError, match="of another model"):
        FREEZER.freeze_circuits(model, InterventionConfig(freeze_type="mean", statistics=statistics))


def test_statistics_of_other_layers_are_refused(model):
    statistics = calibrated(model, layers=[0])
    with pytest.raises(InterventionError, match="holds nothing of layer 1"):
        FREEZER.freeze_circuits(model, InterventionConfig([1], freeze_type="mean", statistics=statistics))


def test_what_is_no_file_of_statistics_is_refused(tmp_path):
    with pytest.raises(InterventionError, match=r"none\.safetensors: cannot be read"):
        ActivationStatistics.load(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors here")
    with pytest.raises(InterventionError, match="cannot be read as safetensors"):
        ActivationStatistics.load(tmp_path / "text.safetensors")
    tiny_model("gpt2").save_pretrained(tmp_path / "model")
    with pytest.raises(InterventionError, match="must be 'circuitfreeze-statistics-1'"):
        ActivationStatistics.load(tmp_path / "model" / "model.safetensors")


def test_what_cannot_be_calibrated_is_refused(model, ids):
    with pytest.raises(InterventionError, match="batches is empty"):
        FREEZER.calibrate(model, [], progress=False)
    padding = {"input_ids": ids, "attention_mask": torch.zeros_like(ids)}
    with pytest.raises(InterventionError, match="batch 1 has no real token"):
        FREEZER.calibrate(model, [ids, padding], progress=False)
    with FREEZER.freeze_circuits(model, InterventionConfig([0])), pytest.raises(InterventionError, match="is frozen"):
        FREEZER.calibrate(model, [ids], progress=False)


def test_float16_statistics_do_not_overflow(ids):
    model = tiny_model("llama", dtype=torch.float16)
    model.model.layers[0].self_attn.v_proj.bias.data.fill_(30_000)
    statistics = FREEZER.calibrate(model, [ids] * 8, layers=[0], progress=False)
    assert statistics[0].mean["v"].isfinite().all()
    assert statistics[0].mean["v"].dtype == torch.float64


def test_memory_does_not_grow_with_the_data():
    model = tiny_model("gpt2")
    ids = torch.zeros(50, 8, dtype=torch.long)

    def peak(count):
        FREEZER.calibrate(model, (ids for _ in range(count)), progress=False)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    few = peak(20)
    assert peak(200) - few < 20_000  # kibibytes, over 10,000 sequences; keeping them would take 46,000


def test_the_bar_can_be_turned_off(model, ids, capsys):
    FREEZER.calibrate(model, [ids], progress=False)
    assert capsys.readouterr().err == ""
    FREEZER.calibrate(model, [ids])
    assert "calibrate" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_statistics_without_what_is_to_be_frozen_are_refused(model, change):
    statistics = calibrated(model)
    mean = statistics[0].mean
    assert isinstance(mean, dict)
    if change == "missing":  # left out, it was taken for 0
        del mean["v"]
    else:
        mean["v"] = mean["v"][:, :-1]
    with pytest.raises(InterventionError, match="the mean of v of layer 0 is"):
        FREEZER.freeze_circuits(model, InterventionConfig([0], None, "ov", "mean", statistics=statistics))
    FREEZER.freeze_circuits(model, InterventionConfig([0], None, "qk", "mean", statistics=statistics)).remove()


@pytest.mark.parametrize(
    ("tensors", "facts"),
    [
        ({"x.y": torch.zeros(1)}, {"tokens": "1"}),
        ({"0.q.mean": torch.zeros(4, 8)}, {"tokens": "1"}),
        ({}, {"tokens": "many"}),
        ({}, {}),
    ],
)
def test_a_file_of_statistics_that_is_not_whole_is_refused(tensors, facts, tmp_path):
    save_file(tensors, tmp_path / "statistics", {"format": ActivationStatistics.file_format, **facts})
    with pytest.raises(InterventionError, match="not what save writes"):
        ActivationStatistics.load(tmp_path / "statistics")
