"""Patching against forward hooks and freezes by hand, and what must hold of it exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoder_decoders import bart
from interrupted import stopped_at
from patched import CLEAN, CORRUPTED, LEFT, TARGETS, patched
from torch import Tensor, nn

from freeze_core import (
    AttentionCircuitFreezer,
    ExperimentalInterventions,
    InterventionConfig,
    InterventionError,
    UnsupportedModelError,
)
from freeze_core.attention.sites import find_sites
from freeze_core.freezing.install import install
from freeze_core.studies.head_sets import roles_of
from freeze_core.studies.patch_plan import by_position
from pytest_circuitfreeze.models import tiny_model

FREEZER = AttentionCircuitFreezer()
CIRCUITS = ["qk", "ov", "both", "q", "k", "v", "z"]


def difference(model: Any, ids: Tensor, **arguments: Tensor) -> Tensor:
    """The metric at the last column `[prompt]`."""
    with torch.no_grad():
        last = model(input_ids=ids, **arguments).logits[:, -1].double()
    return last[:, TARGETS[0]] - last[:, TARGETS[1]]


def by_freezes(model: Any, circuit: str, direction: str, scope: str, **arguments: Tensor) -> Tensor:
    """The metric with each head patched, `[layer, head, prompt]`, as one writes it with a freeze a forward."""
    into, source = (CORRUPTED, CLEAN) if direction == "denoising" else (CLEAN, CORRUPTED)
    recording = FREEZER.record(model, {"input_ids": source, **arguments})
    sizes = FREEZER.get_model_config(model)
    rows = []
    for layer in range(sizes["num_layers"]):
        for head in range(sizes["num_heads"]):
            fields: dict[str, Any] = {"freeze_type": "reference", "reference": recording}
            if circuit == "z":
                frozen = ExperimentalInterventions().freeze_attention_heads(model, {layer: [head]}, **fields)
            else:
                config = InterventionConfig([layer], [head], circuit, kv_scope=scope, **fields)
                frozen = FREEZER.freeze_circuits(model, config)
            with frozen:
                rows.append(difference(model, into, **arguments))
    return torch.stack(rows).unflatten(0, (-1, sizes["num_heads"]))


def close(found: Tensor, expected: Tensor) -> None:
    """To 1e-6 of logits of order 10, in float32 at 6e-8 each, through three layers."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "scope", "direction"),
    [
        ("gpt2", "head", "denoising"),
        ("llama", "group", "noising"),
        ("mistral_gqa", "head", "noising"),
        ("mistral_gqa", "group", "denoising"),
        ("falcon_mqa", "head", "denoising"),
        ("falcon_mqa", "group", "noising"),
    ],
)
def test_heads_are_patched_as_by_one_freeze_a_forward(name: str, scope: str, direction: str) -> None:
    model = tiny_model(name)
    study = patched(model, circuits=CIRCUITS, kv_scope=scope, direction=direction)
    for circuit in CIRCUITS:
        close(study.values[circuit], by_freezes(model, circuit, direction, scope))
    close(study.clean, difference(model, CLEAN))
    close(study.corrupted, difference(model, CORRUPTED))
    assert float((study.values["qk"] - study.baseline[0]).abs().max()) > 0.1


def test_under_group_heads_that_share_a_kv_head_are_one_patch_of_it() -> None:
    values = patched(tiny_model("llama_gqa"), circuits=["v"], kv_scope="group").values["v"]
    assert torch.equal(values[:, 0], values[:, 1])
    assert not torch.equal(values[:, 0], values[:, -1])
    alone = patched(tiny_model("llama_gqa"), circuits=["v"], kv_scope="head").values["v"]
    assert not torch.equal(alone[:, 0], alone[:, 1])


def by_hooks(model: Any, layer: int, columns: list[int], position: int | None, at_output: bool = False) -> Tensor:
    """The metric of GPT-2's corrupted run with columns of what c_attn gives, or c_proj takes, as in the clean run."""
    attention = model.transformer.h[layer].attn
    kept: list[Tensor] = []

    def put(values: Tensor) -> Tensor:
        whole = values.clone()
        at = slice(None) if position is None else slice(position, position + 1)
        whole[:, at, columns] = kept[0][:, at, columns]
        return whole

    def attach(function: Any) -> Any:
        if at_output:
            return attention.c_proj.register_forward_pre_hook(lambda module, args: function(args[0]))
        return attention.c_attn.register_forward_hook(lambda module, args, output: function(output))

    keeping = attach(lambda values: kept.append(values.detach().clone()))
    difference(model, CLEAN)
    keeping.remove()
    putting = attach(put)
    found = difference(model, CORRUPTED)
    putting.remove()
    return found


def test_heads_and_positions_are_patched_as_by_hooks_on_the_fused_projection() -> None:
    model = tiny_model("gpt2")
    width, heads = model.config.n_embd, model.config.n_head
    size = width // heads
    study = patched(model, circuits=["qk", "ov", "z"])
    of_positions = patched(model, circuits=["qk", "ov", "z"], by="position")
    for layer in range(3):
        for head in range(heads):
            q = list(range(head * size, (head + 1) * size))
            close(study.values["qk"][layer, head], by_hooks(model, layer, q + [width + one for one in q], None))
            close(study.values["ov"][layer, head], by_hooks(model, layer, [2 * width + one for one in q], None))
            close(study.values["z"][layer, head], by_hooks(model, layer, q, None, at_output=True))
        for position in range(6):
            every = list(range(width))
            qk = by_hooks(model, layer, list(range(2 * width)), position)
            close(of_positions.values["qk"][layer, position], qk)
            v = by_hooks(model, layer, [2 * width + one for one in every], position)
            close(of_positions.values["ov"][layer, position], v)
            z = by_hooks(model, layer, every, position, at_output=True)
            close(of_positions.values["z"][layer, position], z)


@pytest.mark.parametrize("circuit", CIRCUITS)
@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "falcon_mqa"])
def test_at_other_positions_a_patch_leaves_the_layer_bit_for_bit(name: str, circuit: str) -> None:
    model = tiny_model(name)
    sites = find_sites(model)
    given = {"input_ids": CORRUPTED, "attention_mask": LEFT}
    own, source = seen(model, given), seen(model, {**given, "input_ids": CLEAN})
    config = InterventionConfig(circuit="both" if circuit == "z" else circuit, kv_scope="head")
    roles = ["output"] if circuit == "z" else list(roles_of(circuit))
    patched_ones = set()
    recordings = [FREEZER.record(model, one) for one in (given, {**given, "input_ids": CLEAN})]
    for patches in by_position(sites, {circuit: config}, *recordings):
        for freeze, [(_, position)] in patches:
            patched_ones.add((freeze.layer, position))
            with install([(sites, [freeze])]):
                found = seen(model, given)[freeze.layer]
            others = [one for one in range(6) if one != position]
            for role in roles:
                assert torch.equal(found[role][:, others], own[freeze.layer][role][:, others])
                assert torch.equal(found[role][:, position], source[freeze.layer][role][:, position])
            for role in {"q", "k", "v"} - set(roles):
                assert torch.equal(found[role], own[freeze.layer][role])
    assert patched_ones == {(layer, position) for layer in range(3) for position in range(6)}


def seen(model: Any, given: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """By layer q, k and v, and what the output projection makes of z, row by row."""
    outputs: dict[int, Tensor] = {}

    def keeper(layer: int) -> Any:
        return lambda module, args, output: outputs.update({layer: output.detach().clone()})

    sites = find_sites(model).by_layer
    hooks = [site.layout.output.register_forward_hook(keeper(layer)) for layer, site in sites.items()]
    recording = FREEZER.record(model, given)
    for hook in hooks:
        hook.remove()
    return {layer: {"q": one.q, "k": one.k, "v": one.v, "output": outputs[layer]} for layer, one in recording.items()}


@pytest.mark.parametrize("by", ["head", "position"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("tokens", [1, 86], ids=["rows of one pass", "each in its own pass"])
def test_a_prompt_patched_with_itself_is_the_same(name: str, by: str, tokens: int) -> None:
    copies = -(-tokens // CLEAN.numel())
    clean, corrupted = (one.repeat(copies, 1) for one in (CLEAN, CORRUPTED))
    corrupted[0] = clean[0]
    study = patched(tiny_model(name), clean, corrupted, by=by, circuits=CIRCUITS)
    for values in study.values.values():
        close(values[..., 0], study.baseline[0].expand(values.shape[:2]))
        if tokens > 85:  # then the products are the same, and so are the bits
            assert bool((values[..., 0] == study.baseline[0]).all())
        assert bool((values[..., 1] != study.baseline[1]).any())
    assert study.clean[0] == pytest.approx(float(study.corrupted[0]), abs=1e-5)


def test_patching_no_later_than_the_first_other_token_does_nothing() -> None:
    corrupted = CLEAN.clone()
    corrupted[:, 3] = CORRUPTED[:, 3]
    study = patched(tiny_model("llama_gqa"), CLEAN, corrupted, by="position", circuits=["qk", "ov", "q", "z"])
    for values in study.values.values():
        close(values[:, :3], study.baseline.expand(3, 3, -1))
    for circuit in ("qk", "ov"):  # in the first layer a token's activations are its own
        close(study.values[circuit][0, 4:], study.baseline.expand(2, -1))
        assert float((study.values[circuit][0, 3] - study.baseline).abs().max()) > 1e-3
    close(study.values["q"][-1, :5], study.baseline.expand(5, -1))  # of what only its own position reads


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("name", ["gpt2", "llama_gqa"])
def test_the_last_z_of_one_layer_is_all_that_another_prompt_with_the_same_end_changes(
    name: str, direction: str
) -> None:
    model = tiny_model(name)
    stack: Any = model.transformer if name == "gpt2" else model.model
    attribute = "h" if name == "gpt2" else "layers"
    setattr(stack, attribute, nn.ModuleList([getattr(stack, attribute)[0]]))
    model.config.num_hidden_layers = 1
    corrupted = torch.cat([CORRUPTED[:, :5], CLEAN[:, 5:]], dim=1)
    study = patched(model, CLEAN, corrupted, by="position", circuits=["z"], direction=direction)
    value, low, high = (one[0] for one in study.normalised["z"])
    close(torch.stack([value[5], low[5], high[5]]), torch.ones(3, dtype=torch.float64))
    assert value[:5].abs().max() < 1e-5
    heads = patched(model, CLEAN, corrupted, circuits=["z"], direction=direction).normalised["z"].value[0]
    assert bool((heads != 0).all())


def test_denoising_is_noising_the_other_way_round() -> None:
    model = tiny_model("mistral_gqa")
    one = patched(model, direction="denoising", by="position")
    other = patched(model, CORRUPTED, CLEAN, direction="noising", by="position")
    for circuit in ("qk", "ov", "z"):
        assert torch.equal(one.values[circuit], other.values[circuit])
        assert torch.equal(one.effect[circuit].low, other.effect[circuit].low)
        assert torch.equal(one.normalised[circuit].value, other.normalised[circuit].value)
    assert torch.equal(one.baseline, other.baseline)


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("name", ["gpt2", "llama_gqa"])
def test_padded_pairs_are_patched_as_by_one_freeze_a_forward(name: str, direction: str) -> None:
    model = tiny_model(name)
    clean, corrupted = ({"input_ids": ids, "attention_mask": LEFT} for ids in (CLEAN, CORRUPTED))
    study = patched(model, clean, corrupted, direction=direction)
    for circuit in ("qk", "ov", "z"):
        close(study.values[circuit], by_freezes(model, circuit, direction, "head", attention_mask=LEFT))
    of_positions = patched(model, clean, corrupted, by="position", direction=direction)
    for values in of_positions.values.values():  # nothing depends on padding
        close(values[:, :2, 1], of_positions.baseline[1].expand(3, 2))
        close(values[:, :3, 2], of_positions.baseline[2].expand(3, 3))
    assert float((of_positions.values["ov"][:, 2, 1] - of_positions.baseline[1]).abs().max()) > 1e-3


def test_batches_of_any_length_are_pairs_of_prompts() -> None:
    model = tiny_model("gpt2")
    clean, corrupted = [CLEAN, CLEAN[:2, :4]], [CORRUPTED, CORRUPTED[:2, :4]]
    study = patched(model, clean, corrupted, layers=[1, -1])
    parts = [patched(model, *pair, layers=[1, -1]) for pair in zip(clean, corrupted, strict=True)]
    for circuit in ("qk", "ov", "z"):
        whole = torch.cat([part.values[circuit] for part in parts], dim=-1)
        assert torch.equal(study.values[circuit].nan_to_num(99), whole.nan_to_num(99))
        assert study.effect[circuit].value[0].isnan().all()
        assert not study.effect[circuit].value[1:].isnan().any()
    assert study.n == 5
    with pytest.raises(InterventionError, match=r"clean has batches of \[4, 6\] columns"):
        patched(model, clean, corrupted, by="position")


def test_the_metric_is_an_answer_to_the_clean_prompts() -> None:
    model = tiny_model("gpt2")
    for metric in ("kl", "loss"):
        fields = {"metric": metric, "targets": None, "positions": "all"}
        denoised, noised = (patched(model, direction=one, **fields) for one in ("denoising", "noising"))
        assert torch.allclose(denoised.clean, noised.clean, atol=1e-5)
        assert torch.allclose(denoised.corrupted, noised.corrupted, atol=1e-5)
        assert not torch.allclose(denoised.clean, denoised.corrupted, atol=0.1)
    with torch.no_grad():
        found, expected = (model(ids).logits.double().log_softmax(-1) for ids in (CORRUPTED, CLEAN))
    losses = -found[:, :-1].gather(-1, CLEAN[:, 1:, None])[..., 0].mean(1)
    torch.testing.assert_close(denoised.corrupted, losses)
    divergences = (expected.exp() * (expected - found)).sum(-1).mean(1)
    kl = patched(model, metric="kl", targets=None, positions="all")
    torch.testing.assert_close(kl.corrupted, divergences, rtol=1e-5, atol=0)
    assert bool((patched(model, metric="kl", targets=None, direction="noising").clean == 0).all())
    given = []

    def own(logits: Tensor, inputs: Tensor) -> Tensor:
        given.append(inputs)
        return logits[:, -1, 5] - logits[:, -1, 7]

    mine = patched(model, metric=own, targets=None, positions="all")
    assert all(torch.equal(inputs, CLEAN) for inputs in given)
    close(mine.values["z"], patched(model, positions=[-1]).values["z"])


def test_dropout_is_the_same_in_every_pass_and_generators_are_put_back() -> None:
    model = tiny_model("gpt2").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    torch.manual_seed(1)
    state = torch.get_rng_state()
    clean, corrupted = [CLEAN, CLEAN], [torch.cat([CLEAN[:1], CORRUPTED[1:]]), CORRUPTED]
    for by in ("head", "position"):
        study = patched(model, clean, corrupted, by=by)
        for values in study.values.values():
            assert bool((values[..., 0] == study.baseline[0]).all())
        assert torch.equal(torch.get_rng_state(), state)
        assert not torch.equal(study.clean[:3], study.clean[3:])  # batches draw each their own
    assert model.training


def test_it_runs_in_inference_mode() -> None:
    model = tiny_model("gpt2")
    before = patched(model, by="position")
    with torch.inference_mode():
        found = patched(model, by="position")
    assert torch.equal(found.values["z"], before.values["z"])


def test_a_decoder_is_patched_where_it_reads_its_encoder() -> None:
    model = bart()
    clean, corrupted = ({"input_ids": ids, "decoder_input_ids": CLEAN[:, :4]} for ids in (CLEAN, CORRUPTED))
    study = patched(model, clean, corrupted, attention="cross", circuits=["ov"])
    recording = FREEZER.record(model, clean, attention="cross")
    fields: dict[str, Any] = {"freeze_type": "reference", "reference": recording, "attention": "cross"}
    with FREEZER.freeze_circuits(model, InterventionConfig([1], [2], "ov", **fields)):
        close(study.values["ov"][1, 2], difference(model, CORRUPTED, decoder_input_ids=CLEAN[:, :4]))
    with pytest.raises(InterventionError, match=r"input_ids of batch 0 of clean is \[3, 6\] and of corrupted \[3, 5\]"):
        patched(model, clean, {**corrupted, "input_ids": CORRUPTED[:, :5]}, attention="cross")


def test_a_layer_that_runs_several_times_is_patched_by_head_alone() -> None:
    model = tiny_model("hrm_text")
    study = patched(model, circuits=["ov"])
    recording = FREEZER.record(model, CLEAN)
    fields: dict[str, Any] = {"freeze_type": "reference", "reference": recording, "kv_scope": "head"}
    with FREEZER.freeze_circuits(model, InterventionConfig([0], [1], "ov", **fields)):
        close(study.values["ov"][0, 1], difference(model, CORRUPTED))
    with pytest.raises(UnsupportedModelError, match="layer 0 runs several times in a pass"):
        patched(model, by="position")


@pytest.mark.parametrize("by", ["head", "position"])
def test_after_an_error_the_model_is_what_it_was(by: str) -> None:
    model = tiny_model("llama_gqa")
    stopped_at(10, model, lambda metric: patched(model, metric=metric, targets=None, by=by))
