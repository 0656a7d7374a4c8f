"""Tiny models of any causal LM type: what they look like, that they leave a bug nowhere to hide, and what is refused.

A handful of types stands for all; `python -m pytest_circuitfreeze.shrinking` tries every one.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from pytest_circuitfreeze import shrinking, shrinking_rules
from pytest_circuitfreeze.shrinking import causal_lm_types, shrunken_config, tiny_of_type

# Fused and separate storage, encoders turned decoders, experts, latent attention, hybrids, keys and values shared
# across layers, decoders inside something larger, scores without a scale, norms that add their own 1.
HANDFUL = [
    "bert",
    "bloom",
    "deepseek_v3",
    "gemma",
    "gemma3n_text",
    "gpt_neo",
    "granite",
    "jamba",
    "mixtral",
    "musicgen",
    "qwen3_next",
]


def prompts() -> torch.Tensor:
    """Token ids `[2, 7]`."""
    return torch.randint(4, 96, (2, 7), generator=torch.Generator().manual_seed(1))


def configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from configs(value)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(prompts()).logits


def test_importing_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, pytest_circuitfreeze.shrinking; print({'torch', 'transformers'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_types_are_those_of_transformers_sorted() -> None:
    types = causal_lm_types()
    assert types == sorted(types)
    assert set(HANDFUL) <= set(types)


@pytest.mark.parametrize("model_type", HANDFUL)
def test_a_tiny_model_is_small_and_runs(model_type: str) -> None:
    model = tiny_of_type(model_type, attn="eager")
    assert not model.training
    assert sum(parameter.numel() for parameter in model.parameters()) < 200_000
    first = logits(model)
    assert first.shape == (2, 7, shrinking_rules.VOCABULARY)
    assert first.isfinite().all()
    assert torch.equal(first, logits(model))


@pytest.mark.parametrize("model_type", HANDFUL)
def test_weights_are_a_function_of_the_seed_and_leave_torch_alone(model_type: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = tiny_of_type(model_type, seed=3, attn="eager").state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    again = tiny_of_type(model_type, seed=3, attn="eager").state_dict()
    assert not [name for name, value in one.items() if not torch.equal(value, again[name])]
    other = dict(tiny_of_type(model_type, seed=4, attn="eager").named_parameters())
    assert not [name for name, value in other.items() if torch.equal(value, one[name])]


@pytest.mark.parametrize("model_type", HANDFUL)
def test_no_parameter_is_constant(model_type: str) -> None:
    parameters = tiny_of_type(model_type, attn="eager").named_parameters()
    assert not [name for name, value in parameters if value.numel() > 1 and value.std() < 0.01]


@pytest.mark.parametrize("model_type", HANDFUL)
def test_patterns_are_neither_uniform_nor_a_choice_of_one(model_type: str) -> None:
    with torch.no_grad():
        attentions = tiny_of_type(model_type, attn="eager")(prompts(), output_attentions=True).attentions
    patterns = [pattern for pattern in attentions if torch.is_tensor(pattern)]
    assert patterns
    for pattern in patterns:
        # The last query sees 7 keys, or the 6 of a window: uniform is a peak of 1/6 at most.
        assert 0.28 < pattern[:, :, -1].amax(-1).mean() < 0.88


@pytest.mark.parametrize("model_type", HANDFUL)
def test_dropouts_are_zero_and_token_ids_in_the_vocabulary(model_type: str) -> None:
    for config in configs(shrunken_config(model_type)):
        for name, value in vars(config).items():
            assert "dropout" not in name or not value, name
            assert not name.endswith("token_id") or value is None or 0 <= value < shrinking_rules.VOCABULARY, name


def test_sizes_of_a_plain_type() -> None:
    config = shrunken_config("llama")
    sizes = (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    assert sizes == (3, 4, 2, 8)
    assert config.hidden_size == 32


def test_latent_attention_has_a_kv_head_for_each_query_head_and_rotary_parts() -> None:
    config = shrunken_config("deepseek_v3")
    assert config.num_key_value_heads == config.num_attention_heads == 4
    assert (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim) == (8, 4, 8)


@pytest.mark.parametrize(
    ("model_type", "kinds"),
    [
        ("qwen3_next", ["linear_attention", "linear_attention", "full_attention"]),
        ("gemma2", ["sliding_attention", "full_attention", "sliding_attention"]),
        ("nemotron_h", ["linear_attention", "moe", "full_attention", "mlp"]),
    ],
)
def test_every_kind_of_layer_is_kept(model_type: str, kinds: list[str]) -> None:
    config = shrunken_config(model_type)
    kept = getattr(config, "layers_block_type", None) or config.layer_types
    assert kept == kinds
    assert config.num_hidden_layers == len(kinds)


def test_sections_of_rotary_positions_share_out_all_pairs() -> None:
    small = shrinking._small_rotary({"mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25})
    assert small == {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}


def test_a_type_that_no_exception_names_is_shrunk_by_its_names_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shrinking, "EXCEPTIONS", {})
    monkeypatch.setattr(shrinking, "SOFTER", {})
    for model_type in ("qwen3_next", "deepseek_v3", "gemma3_text", "falcon_h1"):
        assert logits(tiny_of_type(model_type, attn="eager")).isfinite().all()


def test_float64_is_served_where_there_are_experts() -> None:
    double = logits(tiny_of_type("mixtral", attn="eager", dtype=torch.float64))
    assert double.dtype == torch.float64
    assert torch.allclose(double.float(), logits(tiny_of_type("mixtral", attn="eager")), atol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "attn", "message"),
    [
        ("gpt_5", "eager", "no causal language model type 'gpt_5'; it has .*afmoe, .*zaya"),
        ("gemma4_assistant", "eager", "'gemma4_assistant' cannot be configured: .*hidden_size_per_layer_input"),
        ("gemma4_unified_assistant", "eager", "'gemma4_unified_assistant' cannot be built with attention 'eager': "),
        ("bloom", "sdpa", "'bloom' cannot be built with attention 'sdpa': .*does not support"),
        ("blt", "eager", "'blt' cannot run on token ids alone: .*num_hidden_layers"),
    ],
)
def test_what_cannot_be_had_says_why(model_type: str, attn: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_of_type(model_type, attn=attn)
