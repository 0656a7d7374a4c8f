"""Where q, k and v of a few families lie, as one looks them up before one hooks them by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")
SEPARATE = ("opt", "llama", "mistral", "qwen2", "qwen3", "qwen3_next")
FUSED = {
    "gpt2": "c_attn",
    "phi3": "qkv_proj",
    "falcon": "query_key_value",
    "bloom": "query_key_value",
    "gpt_bigcode": "c_attn",
}
LATENT = ("deepseek_v3",)
KNOWN = (*SEPARATE, *FUSED, *LATENT)
"""The types of models whose places are right here."""


@dataclass(eq=False)
class Layer:
    """An attention layer: for each role, a module's name and the features `[head, feature]` of its output."""

    number: int
    module: nn.Module
    places: dict[str, tuple[str, Tensor]]
    heads: int
    kv_heads: int

    @property
    def output(self) -> nn.Module:
        """What takes z."""
        return next(child for name, child in self.module.named_children() if name in OUTPUTS)


def unknown(model: nn.Module) -> str | None:
    """Why nothing is known of where q, k and v lie in a model, if nothing is."""
    config: Any = model.config
    return None if config.model_type in KNOWN else f"where q, k and v lie is known of {', '.join(KNOWN)} alone"


def layers(model: nn.Module) -> list[Layer]:
    """The attention layers of a model of one of the `KNOWN` types; a fused projection may have been split."""
    config: Any = model.config
    heads = config.num_attention_heads
    features = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", heads)
    fused, blocks = FUSED.get(config.model_type, ""), torch.empty(0)
    if config.model_type == "falcon":
        kv_heads = config.num_kv_heads
        if not config.new_decoder_architecture and config.multi_query:
            kv_heads = 1
    elif config.model_type == "gpt_bigcode" and config.multi_query:
        kv_heads = 1
    found: list[Layer] = []
    for path, module in model.named_modules():
        names = {name for name, _ in module.named_children()}
        if "kv_b_proj" in names:
            places, kv_heads = latent_places(config), heads
        elif "q_proj" in names:
            each = {"q": heads, "k": kv_heads, "v": kv_heads}
            places = {r: (f"{r}_proj", torch.arange(n * features).view(n, features)) for r, n in each.items()}
            if config.model_type == "qwen3_next":  # a gate behind each query
                places["q"] = ("q_proj", torch.arange(2 * heads * features).view(heads, -1)[:, :features])
        elif fused in names:
            blocks = torch.arange((heads + 2 * kv_heads) * features).view(-1, features)
            places = {r: (fused, blocks[order]) for r, order in fused_order(config, heads, kv_heads).items()}
        else:
            continue
        number = next(int(part) for part in path.split(".") if part.isdecimal())
        found.append(Layer(number, module, places, heads, kv_heads))
    return found


def latent_places(config: Any) -> dict[str, tuple[str, Tensor]]:
    """Multi-head latent attention, but for its keys: part of them is all heads' own."""
    heads, plain, value = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    unpacked = torch.arange(heads * (plain + value)).view(heads, -1)
    queries = torch.arange(heads * (plain + config.qk_rope_head_dim)).view(heads, -1)
    return {
        "q": ("q_b_proj", queries),
        "k": ("kv_b_proj", unpacked[:, :plain]),
        "v": ("kv_b_proj", unpacked[:, plain:]),
    }


def fused_order(config: Any, heads: int, kv_heads: int) -> dict[str, list[int]]:
    """Which block of head features of a fused projection is whose."""
    total = heads + 2 * kv_heads
    if config.model_type == "falcon" and config.new_decoder_architecture:
        per = heads // kv_heads + 2
        at = {"k": [g * per + per - 2 for g in range(kv_heads)], "v": [g * per + per - 1 for g in range(kv_heads)]}
        return {"q": [b for b in range(total) if b not in at["k"] + at["v"]], **at}
    if config.model_type == "bloom" or (config.model_type in ("falcon", "gpt_bigcode") and not config.multi_query):
        return {"q": list(range(0, total, 3)), "k": list(range(1, total, 3)), "v": list(range(2, total, 3))}
    return {
        "q": list(range(heads)),
        "k": list(range(heads, heads + kv_heads)),
        "v": list(range(heads + kv_heads, total)),
    }
