"""The first Qwen: its code was never in transformers, so its shape is rebuilt here, under the names of its checkpoints.

What matters is `QWenAttention`: one plain linear layer `c_attn` holds all queries, then all keys, then all values.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

__all__ = ["QWenAttention", "QWenConfig", "QWenLMHeadModel", "build"]


class QWenConfig(PretrainedConfig):
    """Sizes of a first-generation Qwen; by default those of the tiny model."""

    model_type = "qwen"

    def __init__(
        self,
        vocab_size: int = 97,
        hidden_size: int = 32,
        intermediate_size: int = 96,
        num_hidden_layers: int = 3,
        num_attention_heads: int = 4,
        max_position_embeddings: int = 96,
        rms_norm_eps: float = 1e-6,
        **rest: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        self.use_cache = True
        super().__init__(**{"tie_word_embeddings": False, **rest})


class QWenAttention(nn.Module):
    """Causal attention over one fused projection with a bias, rotary positions, no bias on the way out."""

    def __init__(self, config: QWenConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = 1
        self.is_causal = True
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The layer's output `[batch, token, hidden]` and, under eager attention, its pattern."""
        query, key, value = (
            part.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for part in self.c_attn(hidden_states).chunk(3, dim=-1)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        name = self.config._attn_implementation
        attend: Callable[..., Any] = eager_attention_forward if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        mixed, pattern = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.head_dim**-0.5)
        return self.c_proj(mixed.flatten(2).contiguous()), pattern


class QWenMLP(nn.Module):
    """A gated MLP, each half of `intermediate_size`."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__()
        half = config.intermediate_size // 2
        self.w1 = nn.Linear(config.hidden_size, half, bias=False)
        self.w2 = nn.Linear(config.hidden_size, half, bias=False)
        self.c_proj = nn.Linear(half, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[batch, token, hidden]`, as it came."""
        found: Tensor = self.c_proj(self.w1(hidden_states) * F.silu(self.w2(hidden_states)))
        return found


class QWenBlock(nn.Module):
    """One decoder layer."""

    def __init__(self, config: QWenConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attn = QWenAttention(config, layer_idx)
        self.ln_2 = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = QWenMLP(config)

    def forward(self, hidden_states: Tensor, **attention: Any) -> Tensor:
        """`[batch, token, hidden]`, as it came."""
        hidden_states = hidden_states + self.attn(self.ln_1(hidden_states), **attention)[0]
        found: Tensor = hidden_states + self.mlp(self.ln_2(hidden_states))
        return found


class QWenPreTrainedModel(PreTrainedModel):
    """What both classes below tell transformers."""

    config_class = QWenConfig
    base_model_prefix = "transformer"
    _supports_sdpa = True


class QWenModel(QWenPreTrainedModel):
    """The decoder."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(QWenBlock(config, at) for at in range(config.num_hidden_layers))
        self.ln_f = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embeddings of token ids."""
        return self.wte

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """The last hidden state `[batch, token, hidden]`, from ids or embeddings.

        Generation hands over the cache as `cache` from transformers 5.24 on, and as `past_key_values` before that.
        """
        cache = past_key_values if cache is None else cache
        embedded: Tensor = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        start = 0 if cache is None else cache.get_seq_length()
        columns = (embedded.new_ones(1, embedded.shape[1]).cumsum(-1) - 1 + start).long()
        position_ids = columns if position_ids is None else position_ids
        # By the names of the newest transformers and of the oldest.
        offered: dict[str, Any] = {
            "config": self.config,
            "inputs_embeds": embedded,
            "input_embeds": embedded,
            "attention_mask": attention_mask,
            "cache_position": columns[0],
            "cache": cache,
            "past_key_values": cache,
            "position_ids": position_ids,
        }
        taken = inspect.signature(create_causal_mask).parameters
        mask = create_causal_mask(**{name: value for name, value in offered.items() if name in taken})
        rotary = self.rotary_emb(embedded, position_ids=position_ids)
        hidden = embedded
        for block in self.h:
            hidden = block(hidden, position_embeddings=rotary, attention_mask=mask, cache=cache)
        return BaseModelOutputWithPast(self.ln_f(hidden), cache)


class QWenLMHeadModel(QWenPreTrainedModel, GenerationMixin):
    """The decoder and its head."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        self.transformer = QWenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits `[batch, token, vocabulary]`, from ids or embeddings."""
        cache = past_key_values if cache is None else cache
        output = self.transformer(input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache)
        hidden, *caches = output.to_tuple()
        return CausalLMOutputWithPast(None, self.lm_head(hidden), *caches)


def build(config: QWenConfig, attn: str) -> PreTrainedModel:
    """A model with fresh weights under the attention implementation `attn`."""
    model: PreTrainedModel = QWenLMHeadModel._from_config(config, attn_implementation=attn)
    return model
