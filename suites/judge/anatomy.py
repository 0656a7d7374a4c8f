"""What the judge knows of attention modules: head counts, and which rows of which weight are whose.

Written from the families' modeling code alone, so that an engine's idea of a storage cannot leak in. Everything is in
canonical form: weights `[head, feature, model_dim]`, activations `[batch, token, head, head_dim]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from pytest_circuitfreeze.wrapped import config_of

__all__ = ["ROLES", "CannotJudge", "Role", "Site", "are_plain", "is_known", "is_plain_linear", "sites"]

Role = Literal["q", "k", "v"]
ROLES: tuple[Role, ...] = ("q", "k", "v")


class CannotJudge(AssertionError):
    """The judge's own instruments do not reach this model, so nothing can be said about the engine."""


@dataclass(frozen=True)
class Family:
    """One family's attention module.

    Args:
        output: name of the output projection.
        fused: name of the fused projection; `None` where q_proj, k_proj and v_proj are apart.
        rotary: whether queries and keys are rotated by the tables that the module is handed.
        scales_query: whether the query is scaled before it meets the keys, rather than the score.
        float32_softmax: whether the eager softmax is taken in float32 whatever the model's dtype.
        transposed: whether the fused weight is `[in, out]` (transformers' Conv1D) rather than `[out, in]`.
    """

    output: str
    fused: str | None = None
    rotary: bool = True
    scales_query: bool = False
    float32_softmax: bool = True
    transposed: bool = False


_LLAMA = Family(output="o_proj")
FAMILIES: Mapping[str, Family] = {
    "GPT2Attention": Family("c_proj", "c_attn", rotary=False, float32_softmax=False, transposed=True),
    "OPTAttention": Family("out_proj", rotary=False, scales_query=True),
    "LlamaAttention": _LLAMA,
    "MistralAttention": _LLAMA,
    "Qwen2Attention": _LLAMA,
    "Phi3Attention": Family("o_proj", "qkv_proj"),
    "FalconAttention": Family("dense", "query_key_value", float32_softmax=False),
}


@dataclass(frozen=True, eq=False)
class Site:
    """One attention layer as the judge sees it.

    Args:
        layer: index of the decoder layer.
        module: the attention module.
        heads, kv_heads, head_dim: head counts and features a head, read from the config.
        scaling: factor of the score `q . k`, on whichever side the family applies it.
        window: how many latest tokens a query sees, itself included; `None` is all.
    """

    layer: int
    module: nn.Module
    family: Family
    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    window: int | None

    @property
    def group(self) -> int:
        """Query heads that read one KV head."""
        return self.heads // self.kv_heads

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return int(self.module.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]  # a config, no tensor

    def parts_of(self, role: Role) -> list[str]:
        """Names of what is read of one role: itself."""
        return [role]

    @property
    def output(self) -> nn.Module:
        """The output projection, whose input is z."""
        return cast(nn.Module, getattr(self.module, self.family.output))

    def count(self, role: Role) -> int:
        """Heads of `role`."""
        return self.heads if role == "q" else self.kv_heads

    def weights(self, read: Callable[[Tensor], Tensor | None] = Tensor.detach) -> dict[Role, Tensor]:
        """Each role's weight `[head, feature, model_dim]`, a view of `read(parameter)`."""
        return self._by_role("weight", read)

    def biases(self, read: Callable[[Tensor], Tensor | None] = Tensor.detach) -> dict[Role, Tensor]:
        """Each role's bias `[head, feature]`, a view of `read(parameter)`; empty where there is none."""
        return self._by_role("bias", read)

    def places(self) -> dict[Role, tuple[str, Tensor]]:
        """For each role the child whose output holds it, and which of its features are whose `[head, feature]`."""
        if hasattr(self.module, "q_proj"):
            apart = {role: torch.arange(self.count(role) * self.head_dim) for role in ROLES}
            return {role: (f"{role}_proj", own.view(-1, self.head_dim)) for role, own in apart.items()}
        whole = self._cut(torch.arange((self.heads + 2 * self.kv_heads) * self.head_dim))
        return {role: (str(self.family.fused), features) for role, features in whole.items()}

    def _by_role(self, name: str, read: Callable[[Tensor], Tensor | None]) -> dict[Role, Tensor]:
        if hasattr(self.module, "q_proj"):
            apart = {role: getattr(getattr(self.module, f"{role}_proj"), name) for role in ROLES}
            found = {role: read(tensor) for role, tensor in apart.items() if tensor is not None}
            return {
                role: tensor.unflatten(0, (self.count(role), self.head_dim))
                for role, tensor in found.items()
                if tensor is not None
            }
        parameter = getattr(getattr(self.module, str(self.family.fused)), name)
        rows = None if parameter is None else read(parameter)
        if rows is None:
            return {}
        return self._cut(rows.T if self.family.transposed and name == "weight" else rows)

    def _cut(self, rows: Tensor) -> dict[Role, Tensor]:
        """A fused projection's features `[out, ...]` as `[head, feature, ...]` of each role."""
        config: Any = self.module.config
        heads, kv_heads, features = self.heads, self.kv_heads, self.head_dim
        blocks = rows.unflatten(0, (-1, features))
        if self.family.fused == "query_key_value" and config.new_decoder_architecture:
            groups = blocks.unflatten(0, (kv_heads, self.group + 2))
            return {"q": groups[:, :-2].flatten(0, 1), "k": groups[:, -2], "v": groups[:, -1]}
        if self.family.fused == "query_key_value" and not config.multi_query:
            return {"q": blocks[0::3], "k": blocks[1::3], "v": blocks[2::3]}
        return {
            "q": blocks[:heads],
            "k": blocks[heads : heads + kv_heads],
            "v": blocks[heads + kv_heads :],
        }

    def used(self, role: Role, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """The activation `[batch, token, head, head_dim]` as attention reads it, `[batch, head, token, head_dim]`.

        Scaled where the family scales its queries, rotated by the model's own tables where it rotates.
        """
        x = x.transpose(1, 2)
        if role == "q" and self.family.scales_query:
            x = x * self.scaling
        return x if role == "v" or rotary is None else _rotate(x, *rotary)

    def unused(self, role: Role, seen: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Inverse of `used`."""
        if role != "v" and rotary is not None:
            cos, sin = rotary
            length = cos.double().square() + sin.double().square()
            seen = _rotate(seen, cos.double() / length, -sin.double() / length)
        if role == "q" and self.family.scales_query:
            seen = seen / self.scaling
        return seen.transpose(1, 2)

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        """Scores `[batch, head, query, key]` of queries and keys as attention reads them."""
        return q @ k.transpose(-1, -2) * (1.0 if self.family.scales_query else self.scaling)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: features `i` and `i + n/2` of the first `n` turn. `x` is `[batch, head, token, feature]`."""
    width = cos.shape[-1]
    turned, kept = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, dim=-1)
    across = torch.cat([-second, first], dim=-1)
    return torch.cat([turned * cos[:, None].to(x) + across * sin[:, None].to(x), kept], dim=-1)


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


def are_plain(site: Site) -> bool:
    """Whether all that the projections of a layer do is to multiply by their weights and to add their biases.

    Adapters (LoRA, IA3), parametrizations (weight norm), quantised weights, hooks, wrappers and compiled projections do
    more. Their weights do not say what they give, and have no gradients that could be compared.
    """
    return all(
        is_plain_linear(site.module.get_submodule(name)) for name in {name for name, _ in site.places().values()}
    )


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


def sites(model: PreTrainedModel) -> dict[int, Site]:
    """The attention layers of `model` by decoder layer. Ask before a freeze: a freeze may change attributes.

    Raises:
        CannotJudge: the judge does not know the model's attention.
    """
    found = {}
    for name, module in model.named_modules():
        known = [base.__name__ for base in type(module).__mro__ if base.__name__ in FAMILIES]
        if known:
            layer = next(int(part) for part in reversed(name.split(".")) if part.isdecimal())
            found[layer] = _site(layer, module, FAMILIES[known[0]])
    if not found:
        raise CannotJudge(
            f"the judge knows no attention of {type(model).__name__}; it knows {', '.join(FAMILIES)} and "
            "their subclasses"
        )
    return found


def _site(layer: int, module: nn.Module, family: Family) -> Site:
    config: Any = module.config
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Site(
        layer=layer,
        module=module,
        family=family,
        heads=heads,
        kv_heads=_kv_heads(config, heads),
        head_dim=head_dim,
        scaling=_scaling(config, head_dim, layer),
        window=_window(config, layer),
    )


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
