"""What is recorded is what the attention reads and writes."""

from __future__ import annotations

import pytest
import torch

from freeze_core import AttentionCircuitFreezer, ExperimentalInterventions, InterventionConfig, InterventionError
from pytest_circuitfreeze.models import tiny_model

FREEZER = AttentionCircuitFreezer()


def test_shapes_are_those_of_the_heads(any_storage, ids):
    kv_heads = FREEZER.get_model_config(any_storage)["num_kv_heads"]
    recording = FREEZER.record(any_storage, ids, pattern=True)
    assert list(recording) == [0, 1, 2]
    for layer in recording.values():
        assert layer.q.shape == layer.z.shape == (2, 7, 4, 8)
        assert layer.k.shape == layer.v.shape == (2, 7, kv_heads, 8)
        assert layer.pattern.shape == (2, 4, 7, 7)
        assert not any(tensor.requires_grad for tensor in vars(layer).values())


def test_z_is_the_pattern_times_the_values_of_the_heads_group(any_storage, ids):
    for layer in FREEZER.record(any_storage, ids, pattern=True).values():
        v = layer.v.repeat_interleave(4 // layer.v.shape[2], dim=2)
        torch.testing.assert_close(torch.einsum("bhts,bshd->bthd", layer.pattern, v), layer.z, atol=1e-5, rtol=1e-5)


def test_the_model_is_left_as_it_was(any_storage, ids):
    implementation, training = any_storage.config._attn_implementation, any_storage.training
    clean = any_storage(ids).logits
    FREEZER.record(any_storage, ids, pattern=True)
    assert any_storage.config._attn_implementation == implementation
    assert any_storage.training == training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in any_storage.modules())
    assert torch.equal(any_storage(ids).logits, clean)


def test_under_a_freeze_the_frozen_values_are_recorded(any_storage, ids):
    group = 4 // FREEZER.get_model_config(any_storage)["num_kv_heads"]
    with FREEZER.freeze_circuits(any_storage, InterventionConfig([1], [1], kv_scope="head")):
        layer = FREEZER.record(any_storage, ids, layers=[-2])[1]
    for role in "qkv":
        assert (getattr(layer, role).abs().amax(dim=(0, 1, 3)) == 0).tolist() == [False, True, False, False]
    assert layer.k.shape[2] == 4 if group > 1 else True


@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_under_a_freeze_of_heads_their_frozen_z_is_recorded(any_storage, ids, strength):
    clean = FREEZER.record(any_storage, ids)[1].z
    with ExperimentalInterventions().freeze_attention_heads(any_storage, {1: [2]}, strength=strength):
        frozen = FREEZER.record(any_storage, ids)[1].z
        again = FREEZER.record(any_storage, ids)[1].z
    assert torch.equal(frozen[:, :, [0, 1, 3]], clean[:, :, [0, 1, 3]])
    assert torch.equal(frozen[:, :, 2], torch.lerp(clean[:, :, 2], torch.zeros(8), strength))
    assert torch.equal(again, frozen)
    assert torch.equal(FREEZER.record(any_storage, ids)[1].z, clean)


def test_inputs_may_be_ids_embeddings_or_arguments(ids):
    model = tiny_model("gpt2")
    by_ids = FREEZER.record(model, ids)[0].q
    assert torch.equal(by_ids, FREEZER.record(model, model.transformer.wte(ids))[0].q)
    mask = torch.ones_like(ids)
    recording = FREEZER.record(model, {"input_ids": ids, "attention_mask": mask})
    assert torch.equal(by_ids, recording[0].q)
    assert torch.equal(recording.attention_mask, mask)
    assert "layers=[0, 1, 2]" in repr(recording)


@pytest.mark.parametrize(
    "bad", ["text", None, torch.zeros(3, dtype=torch.long), torch.zeros(2, 7), torch.zeros(2, 7).bool()]
)
def test_what_is_no_input_is_refused(bad):
    with pytest.raises(InterventionError, match="inputs is"):
        FREEZER.record(tiny_model("gpt2"), bad)


def test_a_layer_out_of_range_is_refused(model, ids):
    with pytest.raises(InterventionError, match="3 is out of range"):
        FREEZER.record(model, ids, layers=[3])


def test_patterns_are_recorded_beneath_a_wrapper_without_a_config(ids):
    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_model("llama").model

        def forward(self, **kwargs):
            return self.inner(**kwargs)

    expected = FREEZER.record(tiny_model("llama"), ids, pattern=True)
    assert torch.equal(FREEZER.record(Wrapper(), ids, pattern=True)[2].pattern, expected[2].pattern)


def test_patterns_that_are_not_formed_are_an_error(ids):
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    own = attention.forward
    attention.forward = lambda *args, **kwargs: (own(*args, **kwargs)[0], None)
    with pytest.raises(InterventionError, match="gave no pattern"):
        FREEZER.record(model, ids, pattern=True)


def test_a_layer_that_did_not_run_is_an_error(ids):
    model = tiny_model("llama")
    model.config.num_hidden_layers = 2  # the model's own way to stop early
    with pytest.raises(InterventionError, match=r"layer 2 .* gave no q, k, v, z"):
        FREEZER.record(model, ids)


def test_activations_are_put_where_they_are_asked_for(any_storage, ids):
    def devices(device):
        recording = FREEZER.record(any_storage, ids, pattern=True, device=device)
        return {tensor.device.type for layer in recording.values() for tensor in vars(layer).values()}

    assert devices(None) == devices("cpu") == {"cpu"}
    assert devices("meta") == {"meta"}  # the only other one that every machine has


def test_a_device_that_is_not_there_is_refused(ids):
    with pytest.raises(InterventionError, match=r"device='toaster': must be None or a device of this machine"):
        FREEZER.record(tiny_model("gpt2"), ids, device="toaster")


def test_a_reference_under_a_mask_of_another_length_is_refused_by_name(ids):
    model = tiny_model("llama_gqa")
    short = FREEZER.record(model, {"input_ids": ids, "attention_mask": torch.ones(len(ids), 3).long()})
    config = InterventionConfig([0], [0], "qk", "reference", reference=short)
    with FREEZER.freeze_circuits(model, config), pytest.raises(InterventionError, match="another attention_mask"):
        model(ids, attention_mask=torch.ones_like(ids))


def test_a_reference_of_other_layers_is_refused(model, ids):
    recording = FREEZER.record(model, ids, layers=[0])
    with pytest.raises(InterventionError, match=r"^reference=Recording\(layers=\[0\]\): holds nothing of layer 1"):
        FREEZER.freeze_circuits(model, InterventionConfig([1], freeze_type="reference", reference=recording))


def test_a_bias_on_scores_is_no_pattern():
    """T5 hands it on beside the pattern, and it has the shape of one."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    model = T5ForConditionalGeneration(config).eval()
    inputs = {"input_ids": torch.arange(5)[None], "decoder_input_ids": torch.arange(6)[None]}
    for attention in ("self", "encoder", "cross"):
        seen = FREEZER.record(model, inputs, pattern=True, attention=attention)
        for layer in range(2):
            assert torch.allclose(seen[layer].pattern.sum(-1), torch.ones(()))


def compile_layers(model):
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = torch.compile(layer, backend="eager")
    return model


def compile_attention(model):
    for layer in model.model.layers:
        layer.self_attn = torch.compile(layer.self_attn, backend="eager")
    return model


def compile_in_place(model):
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("compiled", [compile_layers, compile_attention, compile_in_place])
def test_a_model_that_is_compiled_or_has_compiled_parts_is_recorded_as_the_plain_one(compiled, ids):
    plain, model = tiny_model("llama"), compiled(tiny_model("llama"))
    with torch.no_grad():
        model(ids, use_cache=False)  # compiled before anything listens
    config = InterventionConfig([1], [2])
    for pattern in (False, True):
        wanted, got = (FREEZER.record(one, ids, pattern=pattern) for one in (plain, model))
        with FREEZER.freeze_circuits(plain, config):
            wanted_frozen = FREEZER.record(plain, ids, pattern=pattern)
        with FREEZER.freeze_circuits(model, config):
            got_frozen = FREEZER.record(model, ids, pattern=pattern)
        for one, other in ((wanted, got), (wanted_frozen, got_frozen)):
            for layer in one:
                for name in ("q", "k", "v", "z", *(["pattern"] if pattern else [])):
                    assert torch.equal(getattr(one[layer], name), getattr(other[layer], name))


@pytest.mark.parametrize("write", ["return", "in place"])
def test_a_recording_holds_what_a_freeze_acts_on_before_hooks_of_others(ids, write):
    model = tiny_model("llama")

    def double(module, args, output):
        if write == "in place":
            output.data.mul_(2)
            return None
        return 2 * output

    attention = model.model.layers[1].self_attn
    with torch.no_grad():
        unhooked = FREEZER.record(model, ids)[1].q
        handle = attention.q_proj.register_forward_hook(double)
        clean = model(ids).logits
        recording = FREEZER.record(model, ids)
        assert torch.equal(recording[1].q, unhooked)
        config = InterventionConfig([1], None, "q", "reference", reference=recording)
        with FREEZER.freeze_circuits(model, config):
            torch.testing.assert_close(model(ids).logits, clean)
        handle.remove()


def test_patterns_of_a_model_in_training_are_of_the_pass_that_is_recorded(ids):
    model = tiny_model("gpt2").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    torch.manual_seed(3)
    recording = FREEZER.record(model, ids, pattern=True)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    alone = FREEZER.record(model, ids)
    assert torch.equal(torch.get_rng_state(), after)
    for layer in alone:
        assert torch.equal(alone[layer].q, recording[layer].q)
    layer = recording[2]
    scores = layer.q.transpose(1, 2) @ layer.k.transpose(1, 2).transpose(2, 3) / layer.q.shape[-1] ** 0.5
    seen = torch.ones(scores.shape[-2:]).tril().bool()
    pattern = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    kept = layer.pattern != 0  # dropout on the pattern leaves some out and scales the others
    scale = (layer.pattern / pattern)[kept & seen]
    torch.testing.assert_close(scale, scale[:1].expand_as(scale), rtol=1e-4, atol=0)
