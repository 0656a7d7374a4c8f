"""What a sweep leaves out of its passes, counted by hooks, and that it leaves nothing out that makes a difference."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from one_by_one import one_by_one
from running_twice import run_layers_twice

from freeze_core import score_heads
from freeze_core.generators import Generators
from freeze_core.scoring import batch_passes
from freeze_core.scoring.layer_cache import negate_inputs, refuse_run
from freeze_core.scoring.patched_calls import PatchedModule, assign_actions, attach, run_module
from freeze_core.scoring.projection_cache import ReuseOutput
from pytest_circuitfreeze.models import tiny_model

IDS = torch.arange(14).view(2, 7) * 5 % 97


@pytest.fixture(autouse=True)
def hooks_stand_in_for_a_models_own_code(monkeypatch):
    """What a pass shows is looked at in code of torch and transformers alone; hooks imitate that, and count passes."""
    monkeypatch.setattr(batch_passes, "foreign_code", lambda model: None)


def spread(logits):
    return logits[..., 5].sum(1) - logits[..., 7].sum(1)


@contextmanager
def counting(modules):
    """Counts the forwards of each module and the positions that it was given in them."""
    seen = [[] for _ in modules]
    hooks = [
        module.register_forward_hook(lambda module, args, output, shapes=shapes: shapes.append(args[0].shape[1]))
        for module, shapes in zip(modules, seen, strict=True)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def running(module):
    """Counts how often a module's own forward runs, which hooks on a module that is stood in for do not."""
    runs = []
    original = module.forward
    module.forward = lambda x: (runs.append(x.shape[:2]), original(x))[1]
    try:
        yield runs
    finally:
        del module.forward


def inner(model):
    """A module inside of each layer's MLP."""
    return [layer.mlp.c_fc for layer in model.transformer.h]


def assert_right(model, positions="last", **fields):
    columns = torch.tensor([[6], [6]]) if positions == "last" else torch.arange(7).expand(2, -1)
    found = score_heads(model, IDS, spread, circuits=("qk",), positions=positions, progress=False, **fields).scores
    given = [{"input_ids": IDS}]
    expected = one_by_one(model, given, spread, ("qk",), lambda one: columns, range(3), 4, kv_scope="head", **fields)
    with torch.no_grad():
        scale = columns.shape[1] * float(model(IDS).logits.abs().max())
    torch.testing.assert_close(found["qk"], expected["qk"], rtol=0, atol=1e-6 * scale)


CLEAN_AND_CHECKS = 4
"""Each layer runs in the clean pass, in one with other states, and once by itself."""


def test_a_pass_starts_at_its_layer_and_ends_at_the_wanted_position():
    model = tiny_model("gpt2")
    with counting(inner(model)) as layers, running(model.lm_head) as unembedding:
        score_heads(model, IDS, spread, circuits=("qk",), positions="last", progress=False)
    assert [len(shapes) for shapes in layers] == [CLEAN_AND_CHECKS + 4, CLEAN_AND_CHECKS + 8, CLEAN_AND_CHECKS + 1 + 12]
    assert layers[0][4:] == [7] * 4
    assert layers[2][3:] == [1] * 14  # two of them find out that one position is enough
    assert unembedding == [(2, 7), (4, 1), *[(8, 1)] * 3]  # clean, two to find out, and a layer's passes together


def test_with_all_positions_the_last_layer_runs_whole():
    model = tiny_model("gpt2")
    with counting(inner(model)) as seen:
        score_heads(model, IDS, spread, circuits=("qk",), progress=False)
    assert seen[0] == [7] * 8
    assert seen[2] == [7] * 17


def test_a_projection_runs_once_for_all_freezes_of_its_layer():
    model = tiny_model("gpt2")
    with running(model.transformer.h[2].attn.c_attn) as runs:
        score_heads(model, IDS, spread, circuits=("qk", "ov", "z"), layers=[2], progress=False)
    assert len(runs) == CLEAN_AND_CHECKS + 1 + 1


def test_a_projection_that_is_given_something_else_runs_again():
    linear, generators = torch.nn.Linear(3, 2), Generators(torch.nn.Linear(1, 1))
    x, other = torch.ones(1, 2, 3), torch.zeros(1, 2, 3)
    with torch.no_grad():
        expected, of_other = linear(x), linear(other)
        with running(linear) as runs, attach([PatchedModule(linear, ReuseOutput(generators))]):
            first = linear(x)
            assert linear(x) is first
            assert torch.equal(linear(other), of_other)
            assert len(runs) == 2
            first.add_(1.0)
            assert torch.equal(linear(x), expected)


def test_equal_interventions_are_done_once():
    model = tiny_model("falcon_mqa")
    last = model.transformer.h[2].mlp
    passes = {}
    for scope in ("group", "head"):
        with counting([last]) as seen:
            found = score_heads(model, IDS, spread, circuits=("ov", "v"), kv_scope=scope, progress=False).scores
        passes[scope] = len(seen[0]) - CLEAN_AND_CHECKS - 1
        assert torch.equal(found["ov"], found["v"])
        assert bool((found["ov"] == found["ov"][:, :1]).all()) == (scope == "group")
    assert passes == {"group": 3, "head": 12}


def test_layers_that_a_pass_runs_again_are_run_whole():
    model = tiny_model("hrm_text")
    layers = [module for name, module in model.named_modules() if name.endswith(".mlp")]
    with counting(layers) as seen:
        model(IDS)
        once = [len(shapes) for shapes in seen]
        score_heads(model, IDS, spread, circuits=("qk",), layers=[1], positions="last", progress=False)
    assert min(once) > 0
    assert [len(shapes) for shapes in seen] == [count + 5 * count for count in once]  # the clean pass and 4 heads'


def test_a_list_of_layers_that_a_pass_goes_through_twice_is_run_whole():
    model = tiny_model("gpt2")
    run_layers_twice(model)
    with counting(inner(model)) as seen:
        assert_right(model)
    assert len(seen[0]) == 2 * (2 * (1 + 12) + 1)


def test_a_pass_in_training_starts_at_its_layer_too():
    model = tiny_model("gpt2").train()
    with counting(inner(model)) as seen:
        score_heads(model, IDS, spread, circuits=("qk",), progress=False)
    assert [len(shapes) for shapes in seen][:2] == [CLEAN_AND_CHECKS + 4, CLEAN_AND_CHECKS + 8]


def test_a_layer_that_gives_more_than_tensors_is_run():
    model = tiny_model("gpt2")
    layer = model.transformer.h[0]
    original = layer.forward
    layer.forward = lambda *args, **kwargs: (original(*args, **kwargs), {"kept": 1})
    layer.register_forward_hook(lambda module, args, output: output[0])
    with counting(inner(model)) as seen:
        assert_right(model)
    assert len(seen[0]) == 2 * (1 + 12) + 1


def test_what_later_layers_read_behind_a_layers_back_is_not_left_out():
    model = tiny_model("gpt2")
    kept = {}
    first, last = model.transformer.h[0], model.transformer.h[2]
    first.mlp.register_forward_hook(lambda module, args, output: kept.update(states=output))
    last.register_forward_pre_hook(lambda module, args: (args[0] + kept["states"].flip(-1), *args[1:]))
    with counting(inner(model)) as seen:
        assert_right(model)
    assert len(seen[0]) > 2 * 12


def test_a_layer_that_is_another_in_the_next_pass_is_not_left_out():
    model = tiny_model("gpt2")
    passes = []

    def grow(module, args, output):
        passes.append(1)
        return output * len(passes)

    model.transformer.h[0].mlp.register_forward_hook(grow)
    score_heads(model, IDS, spread, circuits=("qk",), progress=False)
    assert len(passes) > 12


@pytest.mark.parametrize("place", ["mlp.c_fc", "mlp", "ln_f"])
def test_a_module_that_mixes_positions_runs_at_all_of_them(place):
    model = tiny_model("gpt2")
    module = model.transformer.ln_f if place == "ln_f" else model.transformer.h[2].get_submodule(place)
    module.register_forward_hook(lambda module, args, output: output + output.mean(1, keepdim=True))
    with counting(inner(model)) as seen:
        assert_right(model)
    assert len(seen[0]) < 2 * 12 + 8  # layers are left out all the same
    in_sweep = seen[2][CLEAN_AND_CHECKS + 2 :][:12]
    assert in_sweep == [7] * 12 or place == "mlp"


def test_positions_that_are_read_and_make_no_difference_yet_are_run_too():
    model = tiny_model("gpt2")
    mlp = model.transformer.h[2].mlp
    mlp.register_forward_hook(lambda module, args, output: output + (output[:, :1].abs() - 1e6).relu())
    with counting(inner(model)) as seen:
        assert_right(model)
    assert seen[2][-13 - 12 : -13] == [7] * 12


def test_an_unembedding_that_mixes_positions_runs_at_all_of_them():
    model = tiny_model("gpt2")
    model.lm_head.register_forward_hook(lambda module, args, output: output + output.mean(1, keepdim=True))
    assert_right(model)
    assert_right(model, positions="all")


def test_what_follows_the_layers_may_read_behind_their_backs():
    model = tiny_model("gpt2")
    seen = {}
    model.transformer.h[0].mlp.register_forward_hook(lambda module, args, output: seen.update(inner=output))
    model.transformer.ln_f.register_forward_hook(lambda module, args, output: output + seen["inner"])
    assert_right(model)
    assert_right(model, positions="all")


def test_an_unembedding_that_mixes_rows_is_run_for_each_pass():
    model = tiny_model("gpt2")
    model.lm_head.register_forward_hook(lambda module, args, output: output - output.amax(0, keepdim=True))
    assert_right(model)


def test_what_is_written_to_in_place_is_not_kept():
    model = tiny_model("gpt2")
    model.transformer.h[1].register_forward_pre_hook(lambda module, args: (args[0].mul_(1.5), *args[1:]))
    with counting(inner(model)) as seen:
        assert_right(model)
    assert len(seen[0]) > 2 * 12


def test_a_layer_whose_output_is_written_to_later_is_not_replayed():
    """The comparison takes place before what comes after the layer writes to its output again."""
    model = tiny_model("gpt2")
    model.transformer.ln_f.register_forward_pre_hook(lambda module, args: (args[0].mul_(1.5), *args[1:]))
    with counting(inner(model)) as seen:
        assert_right(model)
    assert len(seen[0]) > 2 * 12


def test_actions_end_with_the_pass_whatever_is_raised():
    patch = PatchedModule(torch.nn.Linear(1, 1))
    other = PatchedModule(torch.nn.Linear(1, 1), refuse_run)
    seen = []

    def fail():
        with assign_actions([(patch, negate_inputs), (other, run_module)]):
            seen.extend((patch.action, other.action))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert seen == [negate_inputs, run_module]
    assert patch.action is run_module
    assert other.action is refuse_run


def test_a_compiled_model_is_run_whole():
    model = tiny_model("gpt2")
    model.transformer.h[1].compile(backend="eager")
    with counting(inner(model)[:1]) as seen:
        assert_right(model)
    assert len(seen[0]) == 2 * (1 + 12) + 1


def test_generators_of_an_offloaded_model_are_those_of_all_devices(monkeypatch):
    """Its parameters do not tell where they will be loaded."""
    put = {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.tensor([device.index]))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: put.update({str(device): int(state)}))
    assert len(Generators(torch.nn.Linear(1, 1)).states()) == 1
    generators = Generators(torch.nn.Linear(1, 1, device="meta"))
    generators.put(generators.states())
    assert put == {"cuda:0": 0, "cuda:1": 1}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("when", [1, 2, 9])
def test_the_model_is_what_it_was_whatever_is_raised(when, training):
    model = tiny_model("gpt2").train(training)
    torch.manual_seed(3)
    before = model(IDS).logits
    torch.manual_seed(3)
    calls = []

    def failing(logits):
        calls.append(1)
        if len(calls) == when:
            raise KeyboardInterrupt
        return spread(logits)

    with pytest.raises(KeyboardInterrupt):
        score_heads(model, IDS, failing, positions="last", progress=False)
    assert torch.equal(model(IDS).logits, before)
    assert model.training == training
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_scores_are_had_in_inference_mode_too():
    model = tiny_model("gpt2")
    expected = score_heads(model, IDS, spread, progress=False).scores
    with torch.inference_mode():
        found = score_heads(model, IDS, spread, progress=False).scores
    assert all(torch.equal(found[name], expected[name]) for name in expected)
