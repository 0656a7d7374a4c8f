"""A model of the shape of the first Qwen's, whose code is not in transformers: one fused `c_attn` with a bias, which
holds all queries, then all keys, then all values, rotary positions, and `c_proj` without a bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

__all__ = ["QWenAttention", "qwen_1"]


class QWenAttention(nn.Module):
    """Takes the place of LLaMA's attention, with the names that the first Qwen's code gives to its parts."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.hidden_size = config.hidden_size
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = 0.0
        self.is_causal = True
        self.num_key_value_groups = 1
        self.c_attn = nn.Linear(self.hidden_size, 3 * self.hidden_size)
        self.c_proj = nn.Linear(self.hidden_size, self.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*hidden_states.shape[:-1], self.num_heads, self.head_dim)
        q, k, v = (one.view(shape).transpose(1, 2) for one in self.c_attn(hidden_states).split(self.hidden_size, -1))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        z, pattern = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.c_proj(z.reshape(hidden_states.shape).contiguous()), pattern


def qwen_1(heads: int, head_dim: int, attn: str) -> PreTrainedModel:
    """Two layers, `heads` query heads, each with a KV head of its own."""
    width = heads * head_dim
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=heads,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM._from_config(config, attn_implementation=attn)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn = QWenAttention(model.config, index)
    return model
