"""Splits a fused projection into three: the same function of the same numbers, stored apart."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pytest_circuitfreeze.suites.judge.anatomy import ROLES, is_plain_linear
from pytest_circuitfreeze.suites.judge.sites import FoundSite, made_by, sites

__all__ = ["put_together", "split_found"]


def put_together(attention: type, fused: str, place: Tensor) -> type:
    """A subclass of `attention` in which `fused` gives what q_proj, k_proj and v_proj give, in the family's order."""

    def projection(self: Any, hidden: Tensor) -> Tensor:
        apart = [self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)]
        return torch.cat(apart, dim=-1)[..., place.to(hidden.device)]

    return type(f"Split{attention.__name__}", (attention,), {fused: projection})


def split_found(model: PreTrainedModel) -> PreTrainedModel | None:
    """A copy whose fused projections, found by differentiation, are three linears each; `None` where none is fused."""
    found = [site for site in sites(model).values() if isinstance(site, FoundSite)]
    if not all(_is_fused(site) for site in found):
        return None
    twin = copy.deepcopy(model)
    for site in found:
        module: Any = twin.get_submodule(site.name)
        fused = site.parts["q"].place
        weight, bias = made_by(module.get_submodule(fused)), module.get_submodule(fused).bias
        for role in ROLES:
            rows = site.parts[role].features.flatten()
            linear = nn.Linear(weight.shape[1], len(rows), bias=bias is not None)
            linear.weight = nn.Parameter(weight[rows].clone())
            if bias is not None:
                linear.bias = nn.Parameter(bias.detach()[rows].clone())
            module.add_module(f"{role}_proj", linear)
        order = torch.cat([site.parts[role].features.flatten() for role in ROLES])
        if not hasattr(module, "head_dim"):  # whoever keeps queries apart says how large a head is
            module.head_dim = site.parts["q"].features.shape[1]
        delattr(module, fused)
        module.__class__ = put_together(type(module), fused, order.argsort())
    return twin


def _is_fused(site: FoundSite) -> bool:
    """Whether one linear layer, and nothing but q, k and v, is all that heads are made of."""
    places = {part.place for part in site.parts.values()}
    if len(places) > 1 or "." in next(iter(places)) or not is_plain_linear(site.place(next(iter(site.parts)))):
        return False
    whole = site.place("q")
    features = sum(part.features.numel() for part in site.parts.values())
    return set(site.parts) == set(ROLES) and features == len(made_by(whole)) and hasattr(whole, "bias")
