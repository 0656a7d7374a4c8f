"""Where families of models keep their heads' queries, keys and values: data, one entry a storage.

Facts read off the modeling code of transformers 5.23; `tests/freeze_core/test_families.py` holds them against what
perturbing each feature does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from freeze_core.vocabulary import Role

__all__ = [
    "CONTINUED",
    "FUSED",
    "GATED_QUERY",
    "HARMLESS",
    "LATENT",
    "NORMS",
    "NOT_SOFTMAX",
    "SEPARATE",
    "UNSEPARABLE",
    "FusedStorage",
    "LatentStorage",
    "SeparateStorage",
]

Read = Callable[[Any], Any]
"""Reads a fact off an attention module."""


class SeparateStorage(NamedTuple):
    """Three projections by path within the attention module; `outputs` are the paths its output projection may have."""

    q: str
    k: str
    v: str
    outputs: tuple[str, ...]


SEPARATE = (
    SeparateStorage("q_proj", "k_proj", "v_proj", ("attn_sub_norm", "o_proj", "out_proj", "dense", "c_proj", "Wo")),
    SeparateStorage("self.query", "self.key", "self.value", ("output.dense",)),
    SeparateStorage("q", "k", "v", ("o",)),
    SeparateStorage("Wq", "Wk", "Wv", ("dense",)),
    SeparateStorage("q_lin", "k_lin", "v_lin", ("out_lin",)),
    SeparateStorage("project_q", "project_k", "project_v", ("attention_out",)),
)
"""The first that an attention module has all of. A norm over all heads before the output projection comes first: its
input is z, since behind it the heads are not separate."""

GATED_QUERY = ("Qwen3NextAttention", "Qwen3_5Attention", "Qwen3_5MoeAttention", "Qwen4ExpTextAttention")
"""Classes whose query projection holds, for each head, its query and then an output gate of the same size."""


@dataclass(frozen=True)
class FusedStorage:
    """One projection whose output holds q, k and v in equal blocks, each block in the same order of roles.

    `heads`, `kv_heads` and `blocks` read the numbers off an attention module. `unshared` are the attributes that make
    the module take its multi-head path, with one KV head for each query head, stored then in `unshared_blocks`
    blocks; an MHA family has none.
    """

    projection: str
    output: str
    heads: Read
    kv_heads: Read
    blocks: Read
    order: tuple[Role, Role, Role] = ("q", "k", "v")
    unshared: Callable[[Any], Mapping[str, Any]] | None = None
    unshared_blocks: Read = lambda attention: 1


def _multi_head(
    projection: str, output: str, heads: Read, blocks: Read, order: tuple[Role, Role, Role] = ("q", "k", "v")
) -> FusedStorage:
    return FusedStorage(projection, output, heads, heads, blocks, order)


def _number(*names: str) -> Read:
    """Reads the first of these attributes that the attention module, or its config, has."""

    def read(attention: Any) -> int:
        for owner in (attention, getattr(attention, "config", None)):
            for name in names:
                if hasattr(owner, name):
                    return int(getattr(owner, name))
        raise AttributeError(f"{type(attention).__name__} has none of {', '.join(names)}")

    return read


_heads = _number("num_heads", "num_attention_heads", "n_heads", "n_head")
_kv_heads = _number("num_key_value_heads", "num_kv_heads", "kv_heads")


def _one_block(attention: Any) -> int:
    return 1


def _falcon_blocks(attention: Any) -> int:
    if attention.new_decoder_architecture:
        return int(attention.num_kv_heads)
    return 1 if attention.multi_query else int(attention.num_heads)


FUSED: dict[str, FusedStorage] = {
    "GPT2Attention": _multi_head("c_attn", "c_proj", _heads, _one_block),
    "modeling_openai.Attention": _multi_head("c_attn", "c_proj", _heads, _one_block),
    "MptAttention": _multi_head("Wqkv", "out_proj", _heads, _one_block),
    "BloomAttention": _multi_head("query_key_value", "dense", _heads, _heads),
    "GPTNeoXAttention": _multi_head("query_key_value", "dense", _heads, _heads),
    "GPTNeoXJapaneseAttention": _multi_head("query_key_value", "dense", _heads, _heads),
    "PersimmonAttention": _multi_head("query_key_value", "dense", _heads, _heads),
    "CodeGenAttention": _multi_head("qkv_proj", "out_proj", _heads, lambda attention: 4, order=("q", "v", "k")),
    "QWenAttention": _multi_head("c_attn", "c_proj", _heads, _one_block),
    "Phi3Attention": FusedStorage(
        "qkv_proj",
        "o_proj",
        heads=lambda attention: attention.config.num_attention_heads,
        kv_heads=_kv_heads,
        blocks=_one_block,
        unshared=lambda attention: {
            "num_key_value_heads": attention.config.num_attention_heads,
            "num_key_value_groups": 1,
        },
    ),
    "DbrxAttention": FusedStorage(
        "Wqkv",
        "out_proj",
        heads=_heads,
        kv_heads=_kv_heads,
        blocks=_one_block,
        unshared=lambda attention: {"num_key_value_heads": attention.num_heads, "num_key_value_groups": 1},
    ),
    "GPTBigCodeAttention": FusedStorage(
        "c_attn",
        "c_proj",
        heads=_heads,
        kv_heads=_kv_heads,
        blocks=lambda attention: 1 if attention.multi_query else attention.num_heads,
        unshared=lambda attention: {
            "multi_query": False,
            "kv_heads": attention.num_heads,
            "num_key_value_groups": 1,
        },
        unshared_blocks=_heads,
    ),
    "FalconAttention": FusedStorage(
        "query_key_value",
        "dense",
        heads=_heads,
        kv_heads=_kv_heads,
        blocks=_falcon_blocks,
        unshared=lambda attention: {
            "new_decoder_architecture": False,
            "multi_query": False,
            "num_kv_heads": attention.num_heads,
        },
        unshared_blocks=_heads,
    ),
}
FUSED["Phi4MultimodalAttention"] = FUSED["Phi3Attention"]
"""By the name of the attention class, or of a class that it derives from; with its module where the name is common."""


@dataclass(frozen=True)
class LatentStorage:
    """Multi-head latent attention (MLA): keys and values unpacked per head from a latent, rotary keys shared by all.

    DeepSeek-AI, "DeepSeek-V2", 2024, section 2.1. `unpacked` holds, for each head, its key without positions and then
    its value; the last features of `compressed` are the key features with rotary positions, one for all heads.
    """

    queries: tuple[str, ...] = ("q_b_proj", "q_gate_proj", "q_proj")
    unpacked: str = "kv_b_proj"
    compressed: str = "kv_a_proj_with_mqa"
    output: str = "o_proj"


LATENT = LatentStorage()

NORMS: dict[Role, tuple[str, ...]] = {
    "q": ("q_norm", "q_layernorm", "qk_norm", "query_layernorm"),
    "k": ("k_norm", "k_layernorm", "qk_norm", "key_layernorm"),
    "v": ("v_norm",),
}
"""Norms behind a projection. One that spans all heads is where the activation is; one per head comes after it."""

HARMLESS = {
    *("dropout", "attn_dropout", "attention_dropout", "resid_dropout", "out_drop", "softmax"),
    *("rotary_emb", "rotary_fn", "act_fn", "sinks", "relative_attention_bias", "dense_bias"),
    # Gates on what the heads put out come after z was mixed: they are no part of the OV circuit.
    *("gate_proj", "g_proj", "gate_bias"),
    # A norm of the rotary part of latent keys, one for each head's features, as q_norm and k_norm are.
    "k_rope_only_layernorm",
    # Chooses, from the hidden states alone, which keys a query may see at all: a mask.
    "indexer",
}
"""Children and parameters of an attention module that leave what q, k and v are."""

NOT_SOFTMAX = (
    "BailingHybridDeltaAttention",
    "KimiLinearDeltaAttention",
    "MiniMaxLightningAttention",
    "OlmoHybridGatedDeltaNet",
    "FalconMambaMixer",
    "Mamba2Mixer",
    "MambaMixer",
    "RwkvSelfAttention",
    "xLSTMLayer",
)
"""Classes that mix tokens by a recurrence, without a pattern, whatever their projections are called."""

UNSEPARABLE = {
    "DogeAttention": "its mask is computed from the values, so that freezing OV would move the pattern",
    "DiffLlamaAttention": "its values are halves of two heads and its pattern is a difference of two",
    "DeepseekV4Attention": "its keys and its values are the same features",
    "ProphetNetNgramSelfAttention": "its predicting streams share one pass of the projections with the main stream",
    "InklingAttention": "a convolution over tokens lies between its projections and the attention",
    "Inkling2FullAttention": "a convolution over tokens lies between its projections and the attention",
    "Inkling2SlidingAttention": "a convolution over tokens lies between its projections and the attention",
    "ZayaAttention": "a convolution over tokens lies between its projections and the attention",
    "JetMoeAttention": "its queries are routed to experts, so that heads are not the same from token to token",
    "LSHSelfAttention": "its queries and its keys are the same features",
    "modeling_reformer.LocalSelfAttention": "its layers are reversible: they are run again in each backward pass, "
    "outside of the pass that they came from",
    "modeling_fsmt.Attention": "its projections give [token, batch, feature], so that rows would be taken for tokens",
    "T5Gemma2MergedAttention": "its keys and its values are of the decoder's tokens and of the encoder's, by the same "
    "projections, so that an activation is not one",
    "XLNetRelativeAttention": "its projections are parameters, not modules, so that no output of theirs can be held",
}
"""Classes whose q, k and v cannot be held apart, or not as promised, and why; named as in `FUSED`."""

CONTINUED = {"HrmTextModel": ("L_module.layers", "H_module.layers")}
"""Models with several stacks of layers, all of which each pass runs: layers count on from one to the next."""
