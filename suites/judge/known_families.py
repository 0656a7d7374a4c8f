"""The families that the judge knows by heart: which features of which projection are whose, and how they attend.

Written from the families' modeling code alone, so that an engine's idea of a storage cannot leak in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from pytest_circuitfreeze.suites.judge.attention_formula import Formula
from pytest_circuitfreeze.suites.judge.judged_sites import ROLES, CannotJudge, Part, Role, Site
from pytest_circuitfreeze.wrapped import config_of

__all__ = ["has_plain_projections", "is_known", "is_plain_linear", "known_sites"]


@dataclass(frozen=True)
class Family:
    """One family's attention module.

    Args:
        output: name of the output projection.
        fused: name of the fused projection; `None` where q_proj, k_proj and v_proj are apart.
        rotary, scales_query, float32_softmax: as `Formula` has them.
    """

    output: str
    fused: str | None = None
    rotary: bool = True
    scales_query: bool = False
    float32_softmax: bool = True


_LLAMA = Family(output="o_proj")
FAMILIES: Mapping[str, Family] = {
    "GPT2Attention": Family("c_proj", "c_attn", rotary=False, float32_softmax=False),
    "OPTAttention": Family("out_proj", rotary=False, scales_query=True),
    "LlamaAttention": _LLAMA,
    "MistralAttention": _LLAMA,
    "Qwen2Attention": _LLAMA,
    "Phi3Attention": Family("o_proj", "qkv_proj"),
    "FalconAttention": Family("dense", "query_key_value", float32_softmax=False),
}
KNOWN_TYPES = ("gpt2", "opt", "llama", "mistral", "qwen2", "phi3", "falcon")


def is_known(model: PreTrainedModel) -> bool:
    """Whether the judge knows by heart where the family keeps queries, keys and values, and its attention is its own.

    A class that is merely called as one of the family's, or that has a forward of its own, is found out like any other.
    """
    config = config_of(model)
    if config.model_type not in KNOWN_TYPES or getattr(config, "alibi", False):
        return False
    own = [module for module in model.modules() if _runs_family_code(type(module))]
    return len(own) == int(config.num_hidden_layers)


def _runs_family_code(cls: type) -> bool:
    family: Any = next((base for base in cls.__mro__ if base.__name__ in FAMILIES), None)
    return (
        family is not None
        and family.__module__.startswith("transformers.models.")
        and cast(Any, cls).forward is family.forward
    )


def has_plain_projections(site: Site) -> bool:
    """Whether all that the projections of a layer do is to multiply by their weights and to add their biases.

    Adapters (LoRA, IA3), parametrizations (weight norm), quantised weights, hooks, wrappers and compiled projections do
    more. Their weights do not say what they give, and have no gradients that could be compared.
    """
    return all(is_plain_linear(source) for source in site.sources.values())


def is_plain_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer of floating numbers, as its class computes it, and nothing was put on it."""
    weight = module._parameters.get("weight")
    return (
        type(module).forward in _LINEAR
        and "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks)
        and type(weight) is nn.Parameter
        and weight.is_floating_point()
    )


_LINEAR = (nn.Linear.forward, Conv1D.forward, FalconLinear.forward)


def known_sites(model: PreTrainedModel) -> dict[int, Site]:
    """The attention layers of `model` by decoder layer, with their formulas.

    Raises:
        CannotJudge: the judge does not know the model's attention.
    """
    found = {}
    for name, module in model.named_modules():
        known = [base.__name__ for base in type(module).__mro__ if base.__name__ in FAMILIES]
        if known:
            layer = next(int(part) for part in reversed(name.split(".")) if part.isdecimal())
            found[layer] = _site(layer, name, module, FAMILIES[known[0]])
    if not found:
        raise CannotJudge(
            f"the judge knows no attention of {type(model).__name__}; it knows {', '.join(FAMILIES)} and "
            "their subclasses"
        )
    return found


def _site(layer: int, name: str, module: nn.Module, family: Family) -> Site:
    config: Any = module.config
    heads = config.num_attention_heads
    kv_heads = _kv_heads(config, heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    widths = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
    if hasattr(module, "q_proj"):
        places = {role: (f"{role}_proj", torch.arange(widths[role]).view(-1, head_dim)) for role in ROLES}
    else:
        widths = dict.fromkeys(widths, sum(widths.values()))
        places = {role: (str(family.fused), own) for role, own in _fused_features(config, heads, kv_heads, head_dim)}
    parts: dict[str, Part] = {}
    for role, (path, features) in places.items():
        each = heads // len(features)
        readers = tuple(tuple(range(head * each, (head + 1) * each)) for head in range(len(features)))
        parts[role] = Part(role, path, widths[role], features, readers)
    return Site(
        layer=layer,
        layers=int(config.num_hidden_layers),
        name=name,
        module=module,
        output_name=family.output,
        heads=heads,
        group=heads // kv_heads,
        parts=parts,
        formula=Formula(
            head_dim=head_dim,
            scaling=_scaling(config, head_dim, layer),
            window=_window(config, layer),
            rotary=family.rotary,
            scales_query=family.scales_query,
            float32_softmax=family.float32_softmax,
        ),
    )


def _fused_features(config: Any, heads: int, kv_heads: int, head_dim: int) -> list[tuple[Role, Tensor]]:
    """Which features `[head, feature]` of a fused projection are whose."""
    blocks = torch.arange((heads + 2 * kv_heads) * head_dim).view(-1, head_dim)
    if config.model_type == "falcon" and config.new_decoder_architecture:
        groups = blocks.unflatten(0, (kv_heads, heads // kv_heads + 2))
        return [("q", groups[:, :-2].flatten(0, 1)), ("k", groups[:, -2]), ("v", groups[:, -1])]
    if config.model_type == "falcon" and not config.multi_query:
        return [("q", blocks[0::3]), ("k", blocks[1::3]), ("v", blocks[2::3])]
    return [("q", blocks[:heads]), ("k", blocks[heads : heads + kv_heads]), ("v", blocks[heads + kv_heads :])]


def _kv_heads(config: Any, heads: int) -> int:
    if config.model_type == "falcon":
        if config.new_decoder_architecture:
            return int(config.num_kv_heads)
        return 1 if config.multi_query else heads
    return int(getattr(config, "num_key_value_heads", None) or heads)


def _scaling(config: Any, head_dim: int, layer: int) -> float:
    scale = head_dim**-0.5 if getattr(config, "scale_attn_weights", True) else 1.0
    return scale / (layer + 1) if getattr(config, "scale_attn_by_inverse_layer_idx", False) else scale


def _window(config: Any, layer: int) -> int | None:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[layer] != "sliding_attention":
        return None
    return cast("int | None", getattr(config, "sliding_window", None))
