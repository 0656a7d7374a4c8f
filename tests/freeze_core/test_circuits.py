"""A head's circuits against what the model records and what its weights say when they are read by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from freeze_core import (
    AttentionCircuitFreezer,
    InterventionError,
    UnsupportedModelError,
    copying_scores,
    head_circuits,
)
from freeze_core.attention.sites import find_sites
from freeze_core.circuits import Factored
from pytest_circuitfreeze.models import tiny_model

DEFAULT = ["gpt2", "llama", "mistral_gqa", "falcon_mqa"]
# Every storage, and every way for positions to enter: learned, rotary (of all features, of some, interleaved), scaled
# by YaRN beside sinks, and as a bias on the scores.
FORMS = [
    *DEFAULT,
    "opt",
    "phi3",
    "falcon_gqa",
    "qwen",
    "gptj",
    "gpt_neox",
    "codegen",
    "gpt_oss",
    "bloom",
    "falcon_alibi",
]
IDS = torch.arange(6)[None] * 7 % 97
LAYER = 1


def taken(model: Any, ids: Tensor = IDS, layer: int = LAYER) -> tuple[Tensor, Tensor]:
    """What the attention of a layer takes, and what its output projection gives, `[token, hidden]`."""
    site = find_sites(model).by_layer[layer]
    seen: dict[str, Tensor] = {}
    hooks = [
        site.attention.register_forward_pre_hook(
            lambda _, args, kwargs: seen.update(x=kwargs.get("hidden_states", args[0] if args else None)),
            with_kwargs=True,
        ),
        site.layout.output.register_forward_hook(lambda _, __, output: seen.update(y=output)),
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return seen["x"][0], seen["y"][0]


def close(found: Tensor, expected: Tensor, parts: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= parts * float(expected.abs().max())


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("head", [1, 2])
def test_scores_and_values_are_those_of_the_model(name: str, head: int) -> None:
    model = tiny_model(name, attn="eager")
    x, _ = taken(model)
    seen = AttentionCircuitFreezer().record(model, IDS, [LAYER], pattern=True)[LAYER]
    assert seen.pattern is not None
    tokens = 4  # gpt_oss, mistral: within the window
    circuits = head_circuits(model, LAYER, head, offsets=range(tokens))
    assert circuits.kv_head == head * seen.k.shape[2] // 4
    close(x @ circuits.W_Q + circuits.b_Q, seen.q[0, :, head])
    close(x @ circuits.W_K + circuits.b_K, seen.k[0, :, circuits.kv_head])
    close(x @ circuits.W_V + circuits.b_V, seen.v[0, :, circuits.kv_head])
    pattern = seen.pattern[0, head]
    close(pattern @ seen.v[0, :, circuits.kv_head] @ circuits.W_O, seen.z[0, :, head] @ circuits.W_O)
    # The part of the score that is of both tokens: what the model's logits are less those of either alone.
    assert isinstance(circuits.forms, dict)
    for query in range(1, tokens):
        q, k = seen.q[0, query, head], seen.k[0, : query + 1, circuits.kv_head]
        found = torch.stack([q @ circuits.forms[query - key] @ k[key] for key in range(query + 1)])
        expected = pattern[query, : query + 1].log()
        if name not in ("bloom", "falcon_alibi"):  # whose scores are biased by the distance
            close(found - found[0], expected - expected[0], 2e-4)
    assert torch.equal(circuits.qk(1).matrix(), circuits.W_Q @ circuits.forms[1] @ circuits.W_K.T)


@pytest.mark.parametrize("name", ["bloom", "falcon_alibi"])
def test_a_bias_on_distances_is_no_part_of_the_form(name: str) -> None:
    circuits = head_circuits(tiny_model(name), LAYER, 2, offsets=[0, 3])
    assert isinstance(circuits.forms, dict)
    close(circuits.forms[0], torch.eye(8) / 8**0.5)
    close(circuits.forms[3], torch.eye(8) / 8**0.5)


@pytest.mark.parametrize("name", DEFAULT)
def test_heads_make_up_what_the_output_projection_gives(name: str) -> None:
    model = tiny_model(name)
    x, y = taken(model)
    pattern = AttentionCircuitFreezer().record(model, IDS, [LAYER], pattern=True)[LAYER].pattern
    assert pattern is not None
    whole = torch.zeros_like(y)
    for head in range(4):
        circuits = head_circuits(model, LAYER, head)
        whole += pattern[0, head] @ (x @ circuits.ov.matrix() + circuits.b_V @ circuits.W_O)
    bias = getattr(find_sites(model).by_layer[LAYER].layout.output, "bias", None)
    close(whole, y if bias is None else y - bias.detach())


@pytest.mark.parametrize("name", [*DEFAULT, "bloom", "gemma3_text", "cohere2"])
def test_a_folded_norm_leaves_a_division(name: str) -> None:
    model = tiny_model(name)
    circuits = head_circuits(model, LAYER, 1, fold_norm=True)
    assert circuits.folded
    with torch.no_grad():
        stream = model(IDS, output_hidden_states=True).hidden_states[LAYER][0]
    if name in ("gpt2", "falcon_mqa", "bloom", "cohere2"):  # layer norms
        stream = stream / stream.std(-1, correction=0, keepdim=True)
    else:
        stream = stream / stream.square().mean(-1, keepdim=True).sqrt()
    seen = AttentionCircuitFreezer().record(model, IDS, [LAYER])[LAYER]
    for weight, bias, expected in (
        (circuits.W_Q, circuits.b_Q, seen.q[0, :, 1]),
        (circuits.W_K, circuits.b_K, seen.k[0, :, circuits.kv_head]),
        (circuits.W_V, circuits.b_V, seen.v[0, :, circuits.kv_head]),
    ):
        close(stream @ weight + bias, expected, 1e-4)  # the norm's own constant is left out


def test_weights_are_the_parameters_themselves() -> None:
    gpt2: Any = tiny_model("gpt2")
    found = head_circuits(gpt2, -1, -1)
    attention = gpt2.transformer.h[2].attn
    assert (found.layer, found.head) == (2, 3)
    assert torch.equal(found.W_K, attention.c_attn.weight[:, 32 + 24 : 32 + 32])
    assert torch.equal(found.b_V, attention.c_attn.bias[64 + 24 :])
    assert torch.equal(found.W_O, attention.c_proj.weight[24:])
    mistral: Any = tiny_model("mistral_gqa")
    found = head_circuits(mistral, 0, 3)
    assert torch.equal(found.W_V, mistral.model.layers[0].self_attn.v_proj.weight[8:].T)
    assert torch.equal(found.W_Q, mistral.model.layers[0].self_attn.q_proj.weight[24:].T)


def test_rotary_positions_turn_the_form() -> None:
    circuits = head_circuits(tiny_model("llama"), 0, 0, offsets=[0, 1, 5])
    assert isinstance(circuits.forms, dict)
    frequencies = 10_000.0 ** -(torch.arange(0, 8, 2) / 8)
    for offset, form in circuits.forms.items():
        cos, sin = (offset * frequencies).cos().diag(), (offset * frequencies).sin().diag()
        turned = torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)]).T
        close(form, turned / 8**0.5, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model: Any = tiny_model("llama", dtype=dtype)
    circuits = head_circuits(model, 1, 2, offsets=[1], fold_norm=True)
    assert circuits.W_Q.dtype == (dtype if dtype == torch.float64 else torch.float32)
    plain = head_circuits(model, 1, 2, offsets=[1])
    assert torch.equal(plain.W_O.to(dtype), model.model.layers[1].self_attn.o_proj.weight[:, 16:24].T)
    exact = head_circuits(tiny_model("llama"), 1, 2, offsets=[1])
    close(plain.qk(1).matrix().float(), exact.qk(1).matrix(), 16 * torch.finfo(dtype).eps + 1e-5)


def test_the_small_product_has_the_eigenvalues_of_the_large_one() -> None:
    ov = head_circuits(tiny_model("llama_gqa", dtype=torch.float64), 0, 1).ov
    large = torch.linalg.eigvals(ov.matrix())
    order = large.abs().argsort(descending=True)[:8]
    found = ov.eigenvalues()
    for value in large[order]:
        assert float((found - value).abs().min()) <= 1e-12
    assert torch.allclose(ov.singular_values(), torch.linalg.svdvals(ov.matrix())[:8])
    with pytest.raises(InterventionError, match="has no eigenvalues"):
        Factored(torch.zeros(3, 2), torch.zeros(2, 4)).eigenvalues()


@torch.no_grad()
@pytest.mark.parametrize("name", DEFAULT)
def test_copying_is_that_of_the_matrix_from_word_to_word(name: str) -> None:
    model: Any = tiny_model(name, dtype=torch.float64)
    found = copying_scores(model).values["copying"]
    assert found.shape == (3, 4)
    norm = {"gpt2": "transformer.ln_f", "falcon_mqa": "transformer.ln_f"}.get(name, "model.norm")
    weight = model.get_submodule(norm).weight
    centring = torch.eye(32, dtype=torch.float64) - 1 / 32 * (name in ("gpt2", "falcon_mqa"))
    unembed = centring @ weight.diag() @ model.get_output_embeddings().weight.T
    for head in range(4):
        ov = head_circuits(model, 1, head, fold_norm=True).ov.matrix()
        large = torch.linalg.eigvals(model.get_input_embeddings().weight @ ov @ unembed)
        kept = large[large.abs() > 1e-9 * large.abs().max()]
        assert float(found[1, head]) == pytest.approx(float(kept.real.sum() / kept.abs().sum()), abs=1e-6)


def test_layers_whose_parts_have_lists_of_their_own_have_copying() -> None:
    assert not bool(copying_scores(tiny_model("xlm")).values["copying"].isnan().any())


class Quieter(nn.Module):
    """A part of a layer that hands another one of its own a number for each feature, beside the states."""

    class Times(nn.Module):
        def forward(self, factors: Tensor, x: Tensor) -> Tensor:
            return factors * x

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.times = inner, self.Times()

    def forward(self, x: Tensor) -> Tensor:
        return self.times(torch.full((x.shape[-1],), 0.5), self.inner(x))


def test_what_has_no_tokens_is_no_stream() -> None:
    model: Any = copy.deepcopy(tiny_model("llama"))
    expected = copying_scores(model).values["copying"]
    model.model.layers[1].mlp = Quieter(model.model.layers[1].mlp)
    assert torch.equal(copying_scores(model).values["copying"], expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_adapters_are_part_of_the_matrix() -> None:
    peft = pytest.importorskip("peft", reason="the extra 'conditions' is not installed")
    model: Any = copy.deepcopy(tiny_model("llama"))
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.5)
    adapted = peft.get_peft_model(model, config).train()
    found = head_circuits(adapted, 1, 2).W_V
    layer = model.model.layers[1].self_attn.v_proj
    merged = layer.base_layer.weight + layer.get_delta_weight("default")
    close(found, merged[16:24].T.detach())


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss"])
def test_the_model_is_left_as_it_was(name: str) -> None:
    model = copy.deepcopy(tiny_model(name)).train()
    before = copy.deepcopy(model.state_dict())
    implementation = model.config._attn_implementation
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()(IDS).logits
    state = torch.get_rng_state()
    with torch.inference_mode():
        one = head_circuits(model, 0, 0, offsets=[1], fold_norm=True)
    copying_scores(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model.config._attn_implementation == implementation
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(model.eval()(IDS).logits, logits)
    assert not one.W_Q.requires_grad
    assert not one.qk(1).matrix().requires_grad


def test_an_encoder_sees_both_ways() -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertModel(BertConfig(vocab_size=97, **size)).eval()
    circuits = head_circuits(model, 1, 0, offsets=[-2, 2])
    close(circuits.qk(-2).matrix(), circuits.qk(2).matrix())
    with pytest.raises(
        UnsupportedModelError, match="no norm in layer 1 makes"
    ):  # it comes before the stream is added to
        head_circuits(model, 1, 0, fold_norm=True)
    with pytest.raises(UnsupportedModelError, match="has no embedding and unembedding"):
        copying_scores(model)


@pytest.mark.parametrize("attention", ["self", "cross", "encoder"])
def test_circuits_of_an_encoder_and_decoder(attention: str) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    model: Any = T5ForConditionalGeneration(config).eval()
    circuits = head_circuits(model, 1, 2, offsets=[1], attention=attention)
    stack = model.encoder if attention == "encoder" else model.decoder
    module = stack.block[1].layer[1].EncDecAttention if attention == "cross" else stack.block[1].layer[0].SelfAttention
    assert torch.equal(circuits.W_V, module.v.weight[16:24].T)
    close(circuits.qk(1).matrix(), (module.q.weight[16:24].T @ module.k.weight[16:24]).detach())  # nothing scales it
    assert circuits.ov.matrix().shape == (32, 32)
