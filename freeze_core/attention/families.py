"""Where families of models keep their heads' queries, keys and values: data, one entry a storage.

Facts read off the modeling code of transformers 5.23. A family that stores its three projections separately
under the usual names needs no entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["FUSED", "HARMLESS_CHILDREN", "HARMLESS_PARAMETERS", "OUTPUTS", "SEPARATE", "FusedStorage"]


@dataclass(frozen=True)
class FusedStorage:
    """One projection whose output holds q, k and v in equal blocks, each block in the order q, k, v.

    `heads`, `kv_heads` and `blocks` read the numbers off an attention module. `unshared` are the attributes
    that make the module take its multi-head path, with one KV head for each query head, stored then in
    `unshared_blocks` blocks; an MHA family has none.
    """

    projection: str
    output: str
    heads: Callable[[Any], int]
    kv_heads: Callable[[Any], int]
    blocks: Callable[[Any], int]
    unshared: Callable[[Any], Mapping[str, Any]] | None = None
    unshared_blocks: Callable[[Any], int] | None = None


def _falcon_blocks(attention: Any) -> int:
    if attention.new_decoder_architecture:
        return int(attention.num_kv_heads)
    return 1 if attention.multi_query else int(attention.num_heads)


FUSED: dict[str, FusedStorage] = {
    "GPT2Attention": FusedStorage(
        projection="c_attn",
        output="c_proj",
        heads=lambda attention: attention.num_heads,
        kv_heads=lambda attention: attention.num_heads,
        blocks=lambda attention: 1,
    ),
    "Phi3Attention": FusedStorage(
        projection="qkv_proj",
        output="o_proj",
        heads=lambda attention: attention.config.num_attention_heads,
        kv_heads=lambda attention: attention.num_key_value_heads,
        blocks=lambda attention: 1,
        unshared=lambda attention: {
            "num_key_value_heads": attention.config.num_attention_heads,
            "num_key_value_groups": 1,
        },
        unshared_blocks=lambda attention: 1,
    ),
    "FalconAttention": FusedStorage(
        projection="query_key_value",
        output="dense",
        heads=lambda attention: attention.num_heads,
        kv_heads=lambda attention: attention.num_kv_heads,
        blocks=_falcon_blocks,
        unshared=lambda attention: {
            "new_decoder_architecture": False,
            "multi_query": False,
            "num_kv_heads": attention.num_heads,
        },
        unshared_blocks=lambda attention: attention.num_heads,
    ),
}
"""By the name of the attention class, or of a class that it derives from."""

SEPARATE = ("q_proj", "k_proj", "v_proj")
"""The usual names of three projections."""

OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")
"""The usual names of the output projection, whose input is z."""

HARMLESS_CHILDREN = (
    "q_norm",
    "k_norm",
    "rotary_emb",
    "dropout",
    "attn_dropout",
    "attention_dropout",
    "resid_dropout",
)
"""Children of an attention module that leave q, k, v and z what they are, or are dealt with by name."""

HARMLESS_PARAMETERS = ("sinks",)
"""Parameters of the attention module itself that leave q, k, v and z what they are."""
