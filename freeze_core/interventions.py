"""Experiments on whole heads, and what can be done to a model at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from freeze_core.arguments import refuse
from freeze_core.attention.layout import AttentionSite
from freeze_core.attention.sites import find_sites
from freeze_core.config import InterventionConfig, check_fields, check_on_stale_cache
from freeze_core.errors import InterventionError, UnsupportedModelError, shown
from freeze_core.freezing.edits import Treatment
from freeze_core.freezing.install import FrozenCircuits, install
from freeze_core.freezing.plan import LayerFreeze, assign, storage_for
from freeze_core.freezing.replacements import Zero
from freeze_core.freezing.requests import resolve
from freeze_core.vectors.discovery import discover_intervention_vector
from freeze_core.vocabulary import ATTENTION, BackwardMode, KVScope, Role

__all__ = ["ExperimentalInterventions"]


class ExperimentalInterventions:
    """Freezes whole heads, finds vectors to add to the residual stream, and tells what a model allows.

    Args:
        on_stale_cache: `warn`, `error` or `ignore` a cache that was filled without the freeze it is used under.
    """

    def __init__(self, on_stale_cache: str = "warn") -> None:
        check_on_stale_cache(on_stale_cache)
        self.on_stale_cache = on_stale_cache

    def freeze_attention_heads(
        self, model: nn.Module, heads: Mapping[int, Sequence[int]], **fields: Any
    ) -> FrozenCircuits:
        """Freezes z, what a head puts out `[batch, token, head, head_dim]`: the input of the output projection.

        Args:
            model: any model whose circuits can be frozen.
            heads: the query heads of each layer, `{layer: [heads]}`; negative indices count from the end.
            fields: other fields of `InterventionConfig`: `freeze_type`, `backward_mode`, `strength`, `seed`, ….

        Returns:
            A sequence of handles, one a layer, and a context manager that removes them all.

        Raises:
            CircuitFreezeError: the model, a layer or a head cannot be served; nothing is installed.
        """
        if not isinstance(heads, Mapping) or not heads:
            refuse("heads", heads, "a dict from layer to a list of heads, not empty")
        check_fields(fields, {"layer_indices", "head_indices", "circuit", "kv_scope"}, ["heads"])
        resolved = []
        for layer, chosen in heads.items():
            config = InterventionConfig(layer_indices=[layer], head_indices=chosen, **fields)
            sites = find_sites(model, attention=config.attention)
            resolved.append((sites, resolve(config, sites, roles=("z",))))
        layers = [freezes[0].layer for _, freezes in resolved]
        if len(set(layers)) < len(layers):
            raise InterventionError(f"heads={shown(dict(heads))}: names the same layer twice")
        return install(resolved, self.on_stale_cache)

    discover_intervention_vector = staticmethod(discover_intervention_vector)

    def check_model_compatibility(self, model: nn.Module) -> dict[str, Any]:
        """What can be frozen in this model, site by site, and why not where not.

        Returns:
            `compatible` (whether every attention layer of the decoder can be served), `reasons` (why not), and for each
            of `self`, `cross` and `encoder` attention that the model has a dict from layer to
            `{"name", "architecture", "num_heads", "num_kv_heads", "kv_scope", "limits"}`, or to `{"refused": reason}`.
            `kv_scope` has the scopes in which values can be frozen, `limits` what of a single head cannot be, and why.

        Raises:
            UnsupportedModelError: `model` is no module at all.
        """
        report: dict[str, Any] = {"reasons": []}
        for attention in ATTENTION:
            try:
                sites = find_sites(model, attention=attention)
            except UnsupportedModelError as error:
                if not isinstance(model, nn.Module):
                    raise
                if attention == "self":
                    report["reasons"] = [str(error)]
                continue
            layers: dict[int, dict[str, Any]] = {
                layer: {
                    "name": site.name,
                    "architecture": site.layout.architecture,
                    "num_heads": site.heads,
                    "num_kv_heads": site.kv_heads,
                    "kv_scope": tuple(str(scope) for scope in KVScope if _limit(site, "v", scope) is None),
                    "limits": [
                        limit for role in ("q", "k", "v") for scope in KVScope if (limit := _limit(site, role, scope))
                    ],
                }
                for layer, site in sites.by_layer.items()
            }
            layers |= {layer: {"refused": reason} for layer, reason in sites.refused.items()}
            report[attention] = dict(sorted(layers.items()))
            report["reasons"] += [f"layer {layer}: {reason}" for layer, reason in sites.refused.items()]
        return {"compatible": not report["reasons"], **report}


def _limit(site: AttentionSite, role: Role, scope: KVScope) -> str | None:
    """Why this activation of a single query head cannot be frozen alone, if it cannot."""
    treatment = Treatment(Zero(), BackwardMode.STOPGRAD, 1.0)
    try:
        storage_for(site, assign(site, [LayerFreeze(site.layer, (role,), (0,), scope, treatment)]))
    except UnsupportedModelError as error:
        return f"{role} of one head under kv_scope='{scope}': {error}"
    return None
