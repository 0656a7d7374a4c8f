"""Tiny models with random weights that leave a bug nowhere to hide.

A freshly initialised model hides mistakes: its biases are zero, its norms are ones, its attention is nearly uniform.
Here every parameter is drawn, so that no two heads are alike and every bias and norm matters, and queries and keys
are drawn larger, so that attention has something to choose. Nothing is downloaded.

Importing this module imports no torch: the names are needed while options are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING

from pytest_circuitfreeze.origins import remembered

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

VOCABULARY = 97
POSITIONS = 96


@dataclass(frozen=True)
class TinyArchitecture:
    """One tiny architecture, as plain data.

    All have a hidden size of 32, 97 words, and, where nothing else is said, 3 layers of 4 query heads of 8 features;
    what differs is how q, k and v are stored, how many KV heads there are, and how positions enter.

    Args:
        config: name of the config class, in transformers or as `module:class`; or a model type, whose own config class
            is shrunken (`shrinking.shrunken_config`).
        fields: that config's fields; of a type, those that differ from the shrunken ones.
    """

    config: str
    fields: Mapping[str, object]


def _architecture(config: str, **fields: object) -> TinyArchitecture:
    common = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    return TinyArchitecture(config, MappingProxyType({**common, **fields}))


def _of_type(model_type: str, **fields: object) -> TinyArchitecture:
    return TinyArchitecture(model_type, MappingProxyType(fields))


_DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}
_FALCON = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "alibi": False,
    "bias": True,
}

NAMED_TYPES = (
    # Fused, per head; codegen's in four blocks, queries, values, keys.
    *("bloom", "gpt_neox", "persimmon", "mpt", "codegen", "dbrx"),
    # Separate.
    *("gptj", "qwen2", "qwen3", "stablelm", "starcoder2", "cohere2"),
    # A norm over all heads; soft-caps and norms per head; sinks.
    *("olmo2", "gemma2", "gemma3_text", "gpt_oss"),
    # Experts; a gate on z beside layers without attention; multi-head latent attention (MLA).
    *("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "deepseek_v3"),
)
"""Types among the built-in architectures."""

TINY: Mapping[str, TinyArchitecture] = MappingProxyType(
    {
        # One fused projection, all queries first; learned positions.
        "gpt2": _architecture("GPT2Config", n_embd=32, n_layer=3, n_head=4, n_positions=POSITIONS),
        # What GPT-2 computes, stored as three projections.
        "opt": _architecture(
            "OPTConfig",
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=POSITIONS,
        ),
        # Three projections, rotary positions; as many KV heads as query heads, with biases.
        "llama": _architecture("LlamaConfig", **_DECODER, num_key_value_heads=4, attention_bias=True),
        # Two query heads read each KV head.
        "llama_gqa": _architecture("LlamaConfig", **_DECODER, num_key_value_heads=2),
        # The same with a window that is shorter than the prompts that the suites draw.
        "mistral_gqa": _architecture("MistralConfig", **_DECODER, num_key_value_heads=2, sliding_window=6),
        # LLaMA with q, k and v in one projection, one after the other.
        "phi3": _architecture("Phi3Config", **_DECODER, num_key_value_heads=2),
        # One fused projection: all queries, one key head, one value head.
        "falcon_mqa": _architecture("FalconConfig", **_FALCON, multi_query=True),
        # One fused projection: q, k, v of the first head, then of the second, ...
        "falcon_mha": _architecture("FalconConfig", **_FALCON, multi_query=False),
        # One fused projection: for each KV head its queries, its key, its value.
        "falcon_gqa": _architecture(
            "FalconConfig", **_FALCON, new_decoder_architecture=True, multi_query=False, num_kv_heads=2
        ),
        # Eight query heads read each KV head, as in LLaMA's 70B.
        "llama_70b": _architecture(
            "LlamaConfig", **{**_DECODER, "num_attention_heads": 16}, num_key_value_heads=2, head_dim=4
        ),
        # Positions as a bias on the scores.
        "falcon_alibi": _architecture("FalconConfig", **{**_FALCON, "alibi": True}, multi_query=True),
        # One fused projection: all queries, all keys, all values; its code is not in transformers.
        "qwen": _architecture(
            "pytest_circuitfreeze.local_qwen:QWenConfig",
            hidden_size=32,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
        ),
        # One key head and one value head, or as many as query heads.
        "gpt_bigcode_mqa": _of_type("gpt_bigcode", multi_query=True),
        "gpt_bigcode_mha": _of_type("gpt_bigcode", multi_query=False),
        # What is special in each: see `shrinking` for how a type gets small.
        **{name: _of_type(name) for name in NAMED_TYPES},
    }
)


@remembered
def tiny_model(
    name: str,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    attn: str | None = None,
) -> PreTrainedModel:
    """Builds the tiny model `name` with weights drawn from `seed`, in eval mode.

    Args:
        name: a key of `TINY`, or any causal language model type of transformers.
        seed: weights are a function of name and seed alone; torch's own generators are left as they are.
        dtype: of the parameters, float32 by default. The same draws, rounded, in every dtype.
        device: where the model is put.
        attn: attention implementation, `"eager"` or `"sdpa"`; by default the latter where the class has it.

    Raises:
        ValueError: `name` is neither, or transformers cannot build or run it.

    >>> tiny_model("gpt2").config.n_layer
    3
    """
    from pytest_circuitfreeze import shrinking

    architecture = TINY.get(name) or _of_type(name)
    if architecture.config in shrinking.causal_lm_types():
        model_type, fields = architecture.config, architecture.fields
        return shrinking.tiny_of_type(model_type, fields=fields, seed=seed, dtype=dtype, device=device, attn=attn)
    if name not in TINY:
        raise ValueError(
            f"no tiny model is called {name!r}; there are {', '.join(TINY)}, and the causal language model types of "
            "transformers"
        )
    import torch
    import transformers

    module, _, kind = architecture.config.rpartition(":")
    config = getattr(import_module(module or "transformers"), kind)(**architecture.fields)
    with torch.random.fork_rng(devices=[]):
        model: PreTrainedModel = (
            import_module(module).build(config, attn or "sdpa")
            if module
            else transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attn or "sdpa")
        )
    draw_parameters(model, seed)
    return model.to(device=device, dtype=dtype or torch.float32).eval()


def draw_parameters(model: PreTrainedModel, seed: int) -> None:
    """Draws every parameter of `model` in place, from a generator of its own.

    Vectors (biases and norms' weights) get a standard deviation of 0.3, norms' weights around 1. Matrices keep the size
    of what they multiply; whatever makes queries and keys is 1.6 times larger, which gives attention scores a standard
    deviation above 2 and so patterns that are far from uniform.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim < 2:
                value = 0.3 * noise + (1.0 if _is_norm_weight(name) else 0.0)
            elif "embed" in name or "wte" in name or "wpe" in name:
                value = noise
            else:
                value = noise * (1.6 if _makes_queries(name) else 1.0) / 32**0.5
            parameter.copy_(value)


def _is_norm_weight(name: str) -> bool:
    *_, module, kind = name.split(".")
    return kind == "weight" and ("norm" in module or module.startswith("ln"))


def _makes_queries(name: str) -> bool:
    return any(part in name for part in ("c_attn", "q_proj", "k_proj", "qkv_proj", "query_key_value"))
