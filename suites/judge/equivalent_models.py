"""The same function stored otherwise: models with the same weights whose q, k and v lie elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)

from pytest_circuitfreeze.origins import remembered
from pytest_circuitfreeze.suites.claims import NotApplicable
from pytest_circuitfreeze.suites.judge.judged_sites import ROLES, CannotJudge, Site, rows_of
from pytest_circuitfreeze.suites.judge.known_families import has_plain_projections, is_known, is_plain_linear
from pytest_circuitfreeze.suites.judge.site_lookup import sites

__all__ = ["EquivalentModel", "equivalent_models"]


@dataclass(frozen=True, eq=False)
class EquivalentModel:
    """A model that computes the same function from the same numbers, stored otherwise.

    Args:
        name: says what was done.
        model: in eval mode.
        unshares: whether `kv_scope="head"` can be asked of it where KV heads are shared.
    """

    name: str
    model: PreTrainedModel
    unshares: bool


_MADE: WeakKeyDictionary[PreTrainedModel, list[EquivalentModel]] = WeakKeyDictionary()


@remembered
def equivalent_models(model: PreTrainedModel) -> list[EquivalentModel]:
    """All that are known for `model`, made once and kept as long as it.

    Raises:
        NotApplicable: none is known.
    """
    if not isinstance(model, PreTrainedModel):
        raise NotApplicable(f"no other storage is known of {type(model).__name__}, which wraps a model")
    if is_known(model) and not all(has_plain_projections(site) for site in sites(model).values()):
        raise NotApplicable(
            f"projections of {type(model).__name__} are more than a product with their weights (they are adapted, "
            "parametrized, quantised, hooked or wrapped), which cannot be stored otherwise"
        )
    if model not in _MADE:
        made = []
        split = _split(model)
        if split is not None:
            made.append(EquivalentModel("its fused projection split", split, unshares=False))
        if is_known(model) and model.config.model_type in _OTHER_FAMILY:
            name, build = _OTHER_FAMILY[model.config.model_type]
            made.append(EquivalentModel(name, build(model), unshares=True))
        if not made:
            raise NotApplicable(
                f"{type(model).__name__} stores queries, keys and values apart, and no family is known that computes "
                "the same from another storage"
            )
        for twin in made:
            twin.model.to(device=model.device, dtype=model.dtype).eval()
        _MADE[model] = made
    return _MADE[model]


def _split(model: PreTrainedModel) -> PreTrainedModel | None:
    """A copy whose fused projections are three linears each; `None` where they are not all fused."""
    known = sites(model)
    if not all(_is_fused(site) for site in known.values()):
        return None
    copied = copy.deepcopy(model)
    for site in known.values():
        module: Any = copied.get_submodule(site.name)
        fused = site.parts["q"].path
        weights, biases = site.weights(), site.biases()
        for name, weight in weights.items():
            linear = nn.Linear(weight.shape[-1], weight[..., 0].numel(), bias=bool(biases))
            linear.weight = nn.Parameter(weight.flatten(0, 1))
            if biases:
                linear.bias = nn.Parameter(biases[name].flatten())
            module.add_module(f"{name}_proj", linear)
        order = torch.cat([site.parts[name].features.flatten() for name in ROLES])
        if not hasattr(module, "head_dim"):  # whoever keeps queries apart says how large a head is
            module.head_dim = site.parts["q"].features.shape[1]
        delattr(module, fused)
        module.__class__ = _with_three_projections(type(module), fused, order.argsort())
    return copied


def _is_fused(site: Site) -> bool:
    """Whether one linear layer, and nothing but q, k and v, is all that heads are made of."""
    path, whole = next(iter(site.sources.items()))
    features = sum(part.features.numel() for part in site.parts.values())
    return (
        len(site.sources) == 1
        and set(site.parts) == set(ROLES)
        and "." not in path
        and is_plain_linear(whole)
        and features == site.parts["q"].width
        and hasattr(whole, "bias")
    )


def _with_three_projections(attention: type, fused: str, order: Tensor) -> type:
    """A subclass of `attention` in which `fused` gives what q_proj, k_proj and v_proj give, in the family's order."""

    def projection(self: Any, hidden: Tensor) -> Tensor:
        apart = [self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)]
        return torch.cat(apart, dim=-1)[..., order.to(hidden.device)]

    return type(f"Split{attention.__name__}", (attention,), {fused: projection})


def _as_opt(model: PreTrainedModel) -> PreTrainedModel:
    """GPT-2's weights in OPT: three projections, positions two rows further down."""
    config: Any = model.config
    if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx:
        raise CannotJudge("OPT scales attention by 1/sqrt(head_dim) alone, unlike this GPT-2")
    twin = OPTForCausalLM(
        OPTConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.n_embd,
            word_embed_proj_dim=config.n_embd,
            ffn_dim=config.n_inner or 4 * config.n_embd,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            max_position_embeddings=config.n_positions,
            activation_function=config.activation_function,
            pad_token_id=None,
            tie_word_embeddings=config.tie_word_embeddings,
        )
    )
    gpt2, opt = cast(Any, model).transformer, twin.model.decoder
    pairs = [(gpt2.wte, opt.embed_tokens), (gpt2.ln_f, opt.final_layer_norm), (model.lm_head, twin.lm_head)]
    with torch.no_grad():
        opt.embed_positions.weight.zero_()[2:] = gpt2.wpe.weight
        for block, layer in zip(gpt2.h, opt.layers, strict=True):
            pairs += [(block.ln_1, layer.self_attn_layer_norm), (block.ln_2, layer.final_layer_norm)]
            for turned, linear in (
                (block.attn.c_proj, layer.self_attn.out_proj),
                (block.mlp.c_fc, layer.fc1),
                (block.mlp.c_proj, layer.fc2),
            ):
                linear.weight.copy_(turned.weight.T)
                linear.bias.copy_(turned.bias)
        for source, target in pairs:
            _copy(source, target)
    return _with_projections_of(model, twin)


def _as_gpt2(model: PreTrainedModel) -> PreTrainedModel:
    """OPT's weights in GPT-2: one projection, without the two rows of positions that are never read."""
    config: Any = model.config
    if config.word_embed_proj_dim != config.hidden_size or not config.do_layer_norm_before or not config.enable_bias:
        raise CannotJudge("GPT-2 has no such embedding projection, layer norm order or bias as this OPT")
    twin = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_embd=config.hidden_size,
            n_inner=config.ffn_dim,
            n_layer=config.num_hidden_layers,
            n_head=config.num_attention_heads,
            n_positions=config.max_position_embeddings,
            activation_function=config.activation_function,
            tie_word_embeddings=config.tie_word_embeddings,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    opt, gpt2 = cast(Any, model).model.decoder, twin.transformer
    pairs = [(opt.embed_tokens, gpt2.wte), (opt.final_layer_norm, gpt2.ln_f), (model.lm_head, twin.lm_head)]
    with torch.no_grad():
        gpt2.wpe.weight.copy_(opt.embed_positions.weight[2:])
        for layer, block in zip(opt.layers, gpt2.h, strict=True):
            pairs += [(layer.self_attn_layer_norm, block.ln_1), (layer.final_layer_norm, block.ln_2)]
            for linear, turned in (
                (layer.self_attn.out_proj, block.attn.c_proj),
                (layer.fc1, block.mlp.c_fc),
                (layer.fc2, block.mlp.c_proj),
            ):
                turned.weight.copy_(linear.weight.T)
                turned.bias.copy_(linear.bias)
        for source, target in pairs:
            _copy(source, target)
    return _with_projections_of(model, twin)


def _as_phi3(model: PreTrainedModel) -> PreTrainedModel:
    """A LLaMA-like model's weights in Phi-3: q, k, v in one projection, gate and up in another."""
    config: Any = model.config
    if getattr(config, "mlp_bias", False):
        raise CannotJudge("Phi-3 has no biases in its MLP, unlike this model")
    heads, hidden = config.num_attention_heads, config.hidden_size
    twin = Phi3ForCausalLM(
        Phi3Config(
            vocab_size=config.vocab_size,
            hidden_size=hidden,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or hidden // heads,
            max_position_embeddings=config.max_position_embeddings,
            original_max_position_embeddings=config.max_position_embeddings,
            hidden_act=config.hidden_act,
            rms_norm_eps=config.rms_norm_eps,
            sliding_window=getattr(config, "sliding_window", None),
            tie_word_embeddings=config.tie_word_embeddings,
            pad_token_id=None,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    own, other = cast(Any, model).model, twin.model
    other.rotary_emb = copy.deepcopy(own.rotary_emb)
    pairs = [(own.embed_tokens, other.embed_tokens), (own.norm, other.norm), (model.lm_head, twin.lm_head)]
    with torch.no_grad():
        for source, target in zip(own.layers, other.layers, strict=True):
            for name in ("input_layernorm", "post_attention_layernorm"):
                pairs.append((getattr(source, name), getattr(target, name)))
            pairs.append((source.self_attn.o_proj, target.self_attn.o_proj))
            pairs.append((source.mlp.down_proj, target.mlp.down_proj))
            target.mlp.gate_up_proj.weight.copy_(torch.cat([source.mlp.gate_proj.weight, source.mlp.up_proj.weight]))
        for source, target in pairs:
            _copy(source, target)
    return _with_projections_of(model, twin)


def _copy(source: Any, target: Any) -> None:
    """Copies weight and bias, and a norm's epsilon; a bias that the target's family leaves out is added."""
    target.weight.copy_(source.weight)
    bias = getattr(source, "bias", None)
    if bias is not None:
        target.bias = nn.Parameter(bias.detach().clone())
    for name in ("eps", "variance_epsilon"):
        if hasattr(source, name):
            setattr(target, name, getattr(source, name))


def _with_projections_of(model: PreTrainedModel, twin: PreTrainedModel) -> PreTrainedModel:
    """Fills the twin's q, k and v, wherever it keeps them, with the model's."""
    own = sites(model)
    with torch.no_grad():
        for layer, site in sites(twin).items():
            weights, biases = own[layer].weights(), own[layer].biases()
            for name, part in site.parts.items():
                source: Any = site.sources[part.path]
                rows = cast(Tensor, rows_of(source))
                rows[part.features] = weights[name].to(rows)
                if name in biases:
                    if source.bias is None:
                        source.bias = nn.Parameter(torch.zeros(part.width))
                    source.bias[part.features] = biases[name].to(source.bias)
    return twin


_OTHER_FAMILY: dict[str, tuple[str, Callable[[PreTrainedModel], PreTrainedModel]]] = {
    "gpt2": ("OPT with the same weights", _as_opt),
    "opt": ("GPT-2 with the same weights", _as_gpt2),
    "llama": ("Phi-3 with the same weights", _as_phi3),
    "mistral": ("Phi-3 with the same weights", _as_phi3),
    "qwen2": ("Phi-3 with the same weights", _as_phi3),
}
