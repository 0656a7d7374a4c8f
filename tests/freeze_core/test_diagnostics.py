"""The instruments tell a sound freeze from a broken one."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed.fsdp
from torch.utils.checkpoint import checkpoint

from freeze_core import AttentionCircuitFreezer, InterventionConfig, InterventionError
from freeze_core.freezing import edits
from pytest_circuitfreeze.models import tiny_model

FREEZER = AttentionCircuitFreezer()


@pytest.mark.parametrize("mode", ["stopgrad", "ste", "circuit_ste"])
@pytest.mark.parametrize("strength", [0, 0.3, 1])
@pytest.mark.parametrize("scope", ["group", "head"])
@pytest.mark.parametrize("freeze_type", ["zero", "mean", "noise", "resample"])
def test_a_sound_freeze_passes(any_storage, ids, mode, strength, scope, freeze_type):
    config = InterventionConfig([0, 2], [1], "both", freeze_type, mode, kv_scope=scope, strength=strength)
    result = FREEZER.check_gradient_behavior(any_storage, ids, config)
    assert result["validation_passed"]
    assert result["loss_value"] > 0
    assert result["parameters"].keys() == {name for name, _ in any_storage.named_parameters()}
    assert None not in result["parameters"].values()
    assert all(parameter.grad is None for parameter in any_storage.parameters())


def leak(x, frozen, mask, r, strength, mode):
    """Both modes wrong: the frozen value is right, and a tenth of the gradient comes through."""
    value = torch.where(mask, r.to(x.dtype), frozen).detach()
    return value + 0.1 * (frozen - frozen.detach())


@pytest.mark.parametrize("mode", ["stopgrad", "ste"])
def test_a_gradient_that_breaks_the_identity_fails(model, ids, mode, monkeypatch):
    monkeypatch.setattr(edits, "blend", leak)
    result = FREEZER.check_gradient_behavior(model, ids, InterventionConfig([1], [0], backward_mode=mode))
    assert not result["validation_passed"]


@pytest.mark.parametrize("preserve", [True, False])
def test_a_gradient_that_turns_into_none_fails_unless_allowed(ids, preserve, monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(edits, "blend", lambda x, frozen, *rest: torch.zeros_like(frozen))
    config = InterventionConfig([1], None, "q", preserve_gradients=preserve)
    result = FREEZER.check_gradient_behavior(model, ids, config)
    assert result["validation_passed"] is not preserve
    assert result["parameters"]["model.layers.1.self_attn.q_proj.weight"] is None
    (site,) = result["sites"].values()
    assert site == {"passed": True, "deviation": None, "bound": None, "heads": [], "rows": {}}


def test_a_gradient_that_ends_at_the_freeze_fails(ids, monkeypatch):
    monkeypatch.setattr(edits, "blend", lambda x, frozen, *rest: torch.zeros_like(frozen).requires_grad_())
    config = InterventionConfig([1], None, "q", preserve_gradients=False)
    result = FREEZER.check_gradient_behavior(tiny_model("llama"), ids, config)
    assert not result["validation_passed"]
    assert [site["passed"] for site in result["sites"].values()] == [False]


def test_a_model_that_is_frozen_already_is_not_frozen_twice(model, ids):
    config = InterventionConfig([1], [0], freeze_type="noise")
    alone = FREEZER.check_gradient_behavior(model, ids, config)
    with FREEZER.freeze_circuits(model, config) as handles:
        assert FREEZER.check_gradient_behavior(model, ids, config) == alone
        assert len(handles) == 1
        assert FREEZER.verify_intervention_effect(tiny_model_like(model), model, ids, config)["changed"]


def tiny_model_like(model):
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def test_embeddings_are_an_input_too():
    model = tiny_model("gpt2")
    embeddings = torch.randn(1, 10, 32, requires_grad=True)
    result = FREEZER.check_gradient_behavior(model, embeddings, InterventionConfig([0, 1], [0, 1, 2], "qk"))
    assert result["validation_passed"]
    assert result["parameters"]["transformer.wte.weight"] is not None  # the head is tied to it


def test_a_model_without_gradients_is_an_error(ids):
    model = tiny_model("gpt2").requires_grad_(False)
    with pytest.raises(InterventionError, match="nothing to check"):
        FREEZER.check_gradient_behavior(model, ids, InterventionConfig())


def test_the_table_is_printed_when_asked_for(ids, capsys):
    model = tiny_model("gpt2")
    AttentionCircuitFreezer(debug_gradients=True).check_gradient_behavior(
        model, ids, InterventionConfig([0], [0], "qk")
    )
    printed = capsys.readouterr().out
    assert "transformer.h.0.attn.c_attn.weight" in printed
    assert "transformer.h.0.attn.c_attn: obeys its identity, off by 0.0 where 0.0 is allowed" in printed
    assert "validation PASSED" in printed


@pytest.mark.parametrize("scope", ["group", "head"])
def test_heads_are_told_apart(scope, ids):
    model = tiny_model("llama_gqa")
    result = FREEZER.check_gradient_behavior(model, ids, InterventionConfig([1], [1], "ov", kv_scope=scope))
    (first, second) = result["sites"]["model.layers.1.self_attn.v_proj"]["heads"]
    assert (first["role"], first["head"], first["frozen"], second["frozen"]) == ("v", 0, True, False)
    assert (first["norm"] == 0) == (scope == "group")  # under head, the group's other query head still reads it
    assert second["norm"] > 0
    assert second["nonzero"] > 0.9


@pytest.mark.parametrize(
    ("circuit", "mode", "silent"), [("qk", "ste", True), ("ov", "ste", False), ("qk", "stopgrad", False)]
)
def test_a_gradient_that_cannot_arrive_is_named(circuit, mode, silent, ids):
    model = tiny_model("gpt2")
    result = FREEZER.check_gradient_behavior(model, ids, InterventionConfig([1], [0, 2], circuit, "zero", mode))
    assert result["validation_passed"]
    assert [note.split(",")[0] for note in result["notes"]] == (
        [f"transformer.h.1.attn.c_attn: no gradient arrives at {role} of heads [0" for role in "qk"] if silent else []
    )


def test_the_effect_is_the_largest_change_of_a_logit(model, ids):
    config = InterventionConfig([0], [1], "ov")
    effect = FREEZER.verify_intervention_effect(model, model, ids, config)
    with torch.no_grad():
        clean = model(ids).logits
        with FREEZER.freeze_circuits(model, config):
            difference = (model(ids).logits - clean).abs()
    assert effect["max_absolute_diff"] == pytest.approx(float(difference.max()))
    assert effect["mean_absolute_diff"] == pytest.approx(float(difference.mean()))
    assert effect["changed"]


def test_no_effect_is_told_as_none(model, ids):
    effect = FREEZER.verify_intervention_effect(model, model, ids, InterventionConfig(strength=0))
    assert not any(head["max"] or head["frozen"] for head in effect.pop("heads"))
    assert effect == {"max_absolute_diff": 0.0, "mean_absolute_diff": 0.0, "changed": False}


def test_the_effect_in_training_mode_is_of_one_draw_of_dropout(ids):
    """What differs is what the freeze changes; torch's generator is left where it was."""
    model = tiny_model("gpt2").train()
    before = torch.get_rng_state()
    none, some = (
        FREEZER.verify_intervention_effect(model, model, ids, InterventionConfig([2], [1], "ov", strength=strength))
        for strength in (0.0, 1.0)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert none["max_absolute_diff"] == 0.0
    assert some["changed"]
    assert not any(head["max"] for head in some["heads"] if not head["frozen"])


def test_the_effect_between_training_and_evaluation_is_refused(ids):
    model = tiny_model("gpt2")
    with pytest.raises(InterventionError, match=r"dropout would differ, too; put both in the same mode"):
        FREEZER.verify_intervention_effect(tiny_model("gpt2").train(), model, ids, InterventionConfig([0]))


@pytest.mark.parametrize(("scope", "reading"), [("group", [2, 3]), ("head", [3])])
def test_the_effect_is_told_head_by_head(scope, reading, ids):
    model = tiny_model("llama_gqa")
    config = InterventionConfig([1], [3], "ov", kv_scope=scope)
    heads = FREEZER.verify_intervention_effect(model, model, ids, config)["heads"]
    assert [(one["layer"], one["head"]) for one in heads] == [(layer, head) for layer in range(3) for head in range(4)]
    assert [one["head"] for one in heads if one["frozen"]] == reading
    assert [one["head"] for one in heads if one["layer"] == 1 and one["max"] > 1e-5] == reading
    assert not any(one["max"] for one in heads if one["layer"] == 0)
    assert all(one["max"] > 0 and one["nonzero"] > 0.5 for one in heads if one["layer"] == 2)


def test_rows_of_a_parameter_are_told_apart(any_storage, ids):
    for mode, strength, stopped in (("stopgrad", 1.0, True), ("stopgrad", 0.5, False), ("ste", 1.0, False)):
        config = InterventionConfig([1], [1], "ov", "noise", backward_mode=mode, strength=strength)
        sites = FREEZER.check_gradient_behavior(any_storage, ids, config)["sites"]
        (rows,) = [site["rows"]["weight"] for site in sites.values()]
        assert (rows["frozen"]["max"] == 0) == stopped
        assert "unfrozen" not in rows or rows["unfrozen"]["max"] > 0


def test_a_frozen_baseline_is_refused(model, ids):
    config = InterventionConfig([0])
    with FREEZER.freeze_circuits(model, config), pytest.raises(InterventionError, match="model_baseline is frozen"):
        FREEZER.verify_intervention_effect(model, model, ids, config)


def gradient_norms(model, ids, config):
    freezer = AttentionCircuitFreezer(debug_gradients=True)
    stats = freezer.check_gradient_behavior(model, ids, config)
    assert stats["validation_passed"]
    return {
        name.split("self_attn.")[1]: one for name, one in stats["parameters"].items() if "layers.0.self_attn" in name
    }


def test_gradients_under_stopgrad_and_ste(ids, capsys):
    """All heads' queries and keys at zero: stopgrad gives exactly no gradient, and so does ste.

    Under `ste` the gradient passes unchanged, but it arrives as 0: dq is a sum of keys, dk one of queries, and both
    are 0. With the mean, whose keys do not vanish, the gradient of the queries flows; `circuit_ste` always has it.
    """
    model = tiny_model("llama")
    config = InterventionConfig([0], None, circuit="qk", backward_mode="stopgrad")
    weights = ("q_proj.weight", "k_proj.weight")
    stopgrad = gradient_norms(model, ids, config)
    assert [stopgrad[name]["norm"] for name in weights] == [0.0, 0.0]
    assert [stopgrad[name]["nonzero"] for name in weights] == [0.0, 0.0]
    config.backward_mode = "ste"
    ste = gradient_norms(model, ids, config)
    assert [ste[name]["norm"] for name in weights] == [0.0, 0.0]
    config.freeze_type = "mean"
    assert gradient_norms(model, ids, config)["q_proj.weight"]["norm"] > 0
    config.freeze_type, config.backward_mode = "zero", "circuit_ste"
    circuit = gradient_norms(model, ids, config)
    assert all(circuit[name]["norm"] > 0 for name in weights)
    assert "self_attn.q_proj.weight" in capsys.readouterr().out


def test_a_freeze_that_a_later_one_has_won_over_is_not_taken_to_be_in_force(ids):
    model = tiny_model("llama_gqa")
    config = InterventionConfig([1], [0], "ov")
    with FREEZER.freeze_circuits(model, [config, InterventionConfig([1], [0], "ov", strength=0.0)]):
        assert FREEZER.verify_intervention_effect(tiny_model("llama_gqa"), model, ids, config)["changed"]
        assert FREEZER.check_gradient_behavior(model, ids, config)["sites"]


def test_a_baseline_of_another_shape_is_refused(ids):
    with pytest.raises(InterventionError, match="is another model"):
        FREEZER.verify_intervention_effect(
            tiny_model("llama_70b"), tiny_model("llama_gqa"), ids, InterventionConfig([1], [0], "ov")
        )


@pytest.mark.parametrize("mode", ["stopgrad", "ste", "circuit_ste"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_sound_freeze_passes_under_gradient_checkpointing(reentrant, mode, ids):
    config = InterventionConfig([0, 2], [1], "both", "mean", mode)
    expected = FREEZER.check_gradient_behavior(tiny_model("llama").train(), ids, config)
    model = tiny_model("llama").train()
    model.enable_input_require_grads()
    model._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=reentrant))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    assert FREEZER.check_gradient_behavior(model, ids, config) == expected
    assert expected["validation_passed"]
    assert all(bool((parameter.grad == 3).all()) for parameter in model.parameters())


@pytest.mark.parametrize("mode", ["stopgrad", "ste"])
def test_a_broken_gradient_fails_under_reentrant_checkpointing(mode, ids, monkeypatch):
    monkeypatch.setattr(edits, "blend", leak)
    model = tiny_model("llama").train()
    model.enable_input_require_grads()
    model._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=True))
    config = InterventionConfig([1], [0], backward_mode=mode)
    assert not FREEZER.check_gradient_behavior(model, ids, config)["validation_passed"]


def test_an_optimizer_step_inside_backward_is_not_run_by_the_check(ids):
    model = tiny_model("llama").train()
    model.enable_input_require_grads()
    model._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=True))
    model.lm_head.weight.register_post_accumulate_grad_hook(lambda parameter: pytest.fail("a step was taken"))
    with pytest.raises(InterventionError, match=r"lm_head.weight has a hook .* remove the hook first"):
        FREEZER.check_gradient_behavior(model, ids, InterventionConfig([0], [1]))


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("mode", ["stopgrad", "ste", "circuit_ste"])
def test_a_sound_freeze_passes_where_parameters_are_sharded(mode, ids, one_process):
    config = InterventionConfig([0, 2], [1], "both", backward_mode=mode)
    expected = FREEZER.check_gradient_behavior(tiny_model("llama"), ids, config)
    model = tiny_model("llama")
    for module in (*model.model.layers, model):
        torch.distributed.fsdp.fully_shard(module, mesh=one_process)
    found = FREEZER.check_gradient_behavior(model, ids, config)
    assert found == expected
    assert found["validation_passed"]
    assert all(parameter.grad is None for parameter in model.parameters())
