"""Layers that each pass runs several times: HRM has two stacks, which a pass goes through again and again."""

from __future__ import annotations

import pytest
import torch

from freeze_core import AttentionCircuitFreezer, InterventionConfig, InterventionError
from freeze_core.statistics import ActivationStatistics
from pytest_circuitfreeze.models import tiny_model
from pytest_circuitfreeze.shrinking import tiny_of_type

FREEZER = AttentionCircuitFreezer()
RUNS = {0: 4, 1: 4, 2: 2, 3: 2}
"""By layer, how often it runs: two low cycles in each of two high ones, and one of the high stack after each."""


@pytest.fixture(scope="module")
def looped():
    return tiny_model("hrm_text")


def once():
    """The same weights, each layer run once."""
    return tiny_of_type("hrm_text", fields={"H_cycles": 1, "L_cycles": 1, "L_bp_cycles": [1], "num_hidden_layers": 4})


def attentions(model):
    return [layer.self_attn for stack in (model.model.L_module, model.model.H_module) for layer in stack.layers]


def seen_of(projection, call):
    """The outputs of a projection during a call, run by run."""
    seen = []
    hook = projection.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    call()
    hook.remove()
    return seen


@pytest.mark.parametrize("layer", RUNS)
def test_layers_count_on_over_stacks_and_are_frozen_in_every_run(layer, looped, ids):
    assert FREEZER.get_model_config(looped)["num_layers"] == 4
    with torch.no_grad(), FREEZER.freeze_circuits(looped, InterventionConfig([layer], [1], "v")):
        seen = seen_of(attentions(looped)[layer].v_proj, lambda: looped(ids, use_cache=False))
    assert len(seen) == RUNS[layer]
    assert all(not one[..., 8:16].any() and one[..., 16:].all() for one in seen)


def test_each_run_is_recorded(looped, ids):
    recording = FREEZER.record(looped, ids, pattern=True)
    for layer, runs in RUNS.items():
        seen = seen_of(attentions(looped)[layer].q_proj, lambda: looped(ids, use_cache=False))
        assert recording[layer].q.shape == (runs, *ids.shape, 4, 8)
        assert torch.equal(recording[layer].q.flatten(-2), torch.stack(seen))
        assert recording[layer].pattern.shape == (runs, len(ids), 4, ids.shape[1], ids.shape[1])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_run_is_held_at_its_own_recording(checkpointing, ids):
    model = tiny_model("hrm_text")
    reference = FREEZER.record(model, ids.flip(-1))
    config = InterventionConfig([1], [2], "v", "reference", "ste", reference=reference)
    gradients = []
    for checkpointed in {False, checkpointing}:
        model.train(checkpointed)
        if checkpointed:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        with FREEZER.freeze_circuits(model, config):
            seen = seen_of(attentions(model)[1].v_proj, lambda: model(ids, use_cache=False))
            model(ids, use_cache=False).logits.sum().backward()
        assert len(seen) == RUNS[1]
        for run, output in enumerate(seen):
            assert torch.equal(output[..., 16:24], reference[1].v[run][..., 2, :])
        gradients.append(attentions(model)[1].v_proj.weight.grad.clone())
        model.zero_grad()
    assert gradients[0].any()
    torch.testing.assert_close(gradients[0], gradients[-1])


def test_each_run_has_statistics_of_its_own(looped, ids, tmp_path):
    statistics = FREEZER.calibrate(looped, [ids, ids[:1, :3]], progress=False)
    assert statistics[0].mean["v"].shape == statistics[0].std["v"].shape == (4, 4, 8)
    recordings = [FREEZER.record(looped, batch) for batch in (ids, ids[:1, :3])]
    samples = torch.cat([one[2].v.double().flatten(1, 2) for one in recordings], dim=1)
    torch.testing.assert_close(statistics[2].mean["v"], samples.mean(1))
    statistics.save(tmp_path / "statistics.safetensors")
    loaded = ActivationStatistics.load(tmp_path / "statistics.safetensors")
    config = InterventionConfig([2], [0], "v", "mean", statistics=loaded)
    with torch.no_grad(), FREEZER.freeze_circuits(looped, config):
        seen = seen_of(attentions(looped)[2].v_proj, lambda: looped(ids, use_cache=False))
    for run, output in enumerate(seen):
        torch.testing.assert_close(output[..., :8], statistics[2].mean["v"][run, 0].float().expand(*ids.shape, 8))


def test_a_recording_of_fewer_runs_is_an_error(looped, ids):
    config = InterventionConfig([1], [0], "v", "reference", reference=FREEZER.record(once(), ids))
    why = "recorded of 1 run of a layer that runs once more in this pass"
    with FREEZER.freeze_circuits(looped, config), pytest.raises(InterventionError, match=why):
        looped(ids, use_cache=False)
    assert not any("forward" in vars(module) for module in looped.modules())


@pytest.mark.parametrize("mode", ["stopgrad", "circuit_ste"])
def test_one_gradient_is_not_told_of_layers_that_run_several_times(mode, looped, ids):
    config = InterventionConfig([2], [1], "v", backward_mode=mode)
    with pytest.raises(InterventionError, match="no one gradient tells"):
        FREEZER.check_gradient_behavior(looped, ids, config)
    assert FREEZER.check_gradient_behavior(once(), ids, config)["validation_passed"]
    assert not any("forward" in vars(module) for module in looped.modules())
