"""The models that the benchmarks run: random weights, the shapes that figures are given for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel


def gpt2(**shape: Any) -> PreTrainedModel:
    """A GPT-2 of a shape; by default GPT-2 small's."""
    return _built(GPT2LMHeadModel, GPT2Config(**shape))


def llama_gqa() -> PreTrainedModel:
    """A LLaMA whose pairs of query heads share a KV head."""
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "vocab_size": 8000}
    return _built(LlamaForCausalLM, LlamaConfig(**shape, num_attention_heads=8, num_key_value_heads=4))


def tiny() -> PreTrainedModel:
    """A GPT-2 whose products cost next to nothing, so that what is around them shows."""
    return gpt2(n_layer=2, n_embd=64, n_head=4, n_positions=128, vocab_size=1000)


SIZES: Mapping[str, tuple[Callable[[], PreTrainedModel], int, int]] = MappingProxyType(
    {"tiny": (tiny, 16, 40), "llama_gqa": (llama_gqa, 64, 15), "gpt2_small": (gpt2, 64, 9)}
)
"""By name: how it is built, the tokens of a prompt, and the rounds that are measured."""


def ids(model: PreTrainedModel, tokens: int, rows: int = 1) -> Tensor:
    """Token ids `[rows, tokens]`, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (rows, tokens), generator=generator)


def _built(kind: Any, config: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = kind(config).eval()
    return model.requires_grad_(False)
