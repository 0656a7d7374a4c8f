"""Experiments on whole heads, and what can be done to a model at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from freeze_core.attention.layout import AttentionSite
from freeze_core.attention.sites import find_sites
from freeze_core.config import InterventionConfig, check_on_stale_cache
from freeze_core.errors import InterventionError, UnsupportedModelError, shown
from freeze_core.freezing.edits import Treatment
from freeze_core.freezing.install import FrozenCircuits, install
from freeze_core.freezing.plan import LayerFreeze, assign, storage_for
from freeze_core.freezing.replacements import Zero
from freeze_core.freezing.requests import resolve
from freeze_core.vectors.discovery import discover
from freeze_core.vectors.vector import InterventionVector
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
            raise InterventionError(f"heads={shown(heads)}: must be a dict from layer to a list of heads, not empty")
        taken = {"layer_indices", "head_indices", "circuit", "kv_scope"} & fields.keys()
        unknown = sorted(taken | (fields.keys() - InterventionConfig.__dataclass_fields__.keys()))
        if unknown:
            raise InterventionError(f"{', '.join(unknown)}: no such field of a freeze of whole heads")
        resolved = []
        for layer, chosen in heads.items():
            config = InterventionConfig(layer_indices=[layer], head_indices=chosen, **fields)
            sites = find_sites(model, attention=config.attention)
            resolved.append((sites, resolve(config, sites, roles=("z",))))
        layers = [freezes[0].layer for _, freezes in resolved]
        if len(set(layers)) < len(layers):
            raise InterventionError(f"heads={shown(dict(heads))}: names the same layer twice")
        return install(resolved, self.on_stale_cache)

    def discover_intervention_vector(
        self,
        model: nn.Module,
        positive: Any,
        negative: Any,
        layer: int,
        method: str = "mean_difference",
        *,
        positions: str | Sequence[int] = "last",
        held_out: float = 0.5,
        seed: int = 0,
        metric: str | Callable[..., Any] | None = None,
        targets: Any = None,
        strengths: Sequence[float] = (1.0,),
        apply_positions: str | Sequence[int] = "all",
        metric_positions: str | Sequence[int] = "last",
        max_norm: float | None = None,
        steps: int | None = None,
        tokenizer: Any = None,
        batch_size: int = 8,
        confidence: float = 0.95,
        resamples: int = 9_999,
        resampling_seed: int = 0,
        progress: bool = True,
    ) -> InterventionVector:
        """A vector of the residual stream that leads from negative to positive prompts, judged on prompts held out.

        Prompts are split by `seed` into those that the vector is found on and those that it is judged on; where there
        are as many positive as negative ones they are pairs, in order, and split together. What is judged: how well
        projections on the vector tell held-out prompts apart (AUC, accuracy), how alike the vectors of halves of the
        others are, and, with a `metric`, what adding the vector does to it on held-out negative prompts, beside random
        vectors of the same length. The model runs as it is, in its own mode; no parameter, gradient, flag or generator
        of it is touched.

        Args:
            model: unfrozen; what it was again afterwards, whatever is raised.
            positive, negative: token ids `[prompt, token]`, a dict of model arguments (with an `attention_mask` where
                there is padding), an iterable of either, or a list of texts; four of each at least, each once.
            layer: after which decoder layer; negative ones count from the end. That of the last is before the final
                norm.
            method: `mean_difference`; `principal_component`, of pairs' differences, not centred; or `optimised`, by
                gradients: the vector whose adding to negative prompts raises `metric` most (lowers it where it is
                `loss`), as long as `max_norm` at most. See `freeze_core.vectors.methods` and `.optimised`.
            positions: where the stream is read, a prompt's mean over them: `last`, the last real token, `all`, those
                that are not padding, or columns.
            held_out: the share of prompts of each kind that is held out, in (0, 1); two at least, as are left.
            seed: of the split, the halves, the random vectors, and where `optimised` starts.
            metric: of the logits at `metric_positions`, as in `score_heads`.
            targets: of a built-in metric, one prompt's for all, or of each negative prompt.
            strengths: times which the vector is added; distinct finite numbers.
            apply_positions: where it is added, as in `InterventionVector.apply`.
            metric_positions: `all`, `last` or columns.
            max_norm: of `optimised`; `None` is the length of the difference of means.
            steps: of `optimised`; `None` is 50.
            tokenizer: for texts, padded on its side; where positions are learned, right padding leaves them alone.
            batch_size: how many texts are padded to one length and run at once.
            confidence: of intervals, in (0, 1).
            resamples: how often prompts are drawn anew for an interval, and signs for a test.
            resampling_seed: of these draws.
            progress: show a bar while effects are measured.

        Raises:
            UnsupportedModelError: the model cannot be served.
            InterventionError: an argument that cannot be served, before anything is run; or what a pass cannot serve.
            ImportError: scipy is not installed.

        Example:
            >>> vector = ExperimentalInterventions().discover_intervention_vector(  # doctest: +SKIP
            ...     model, glad, sad, layer=12, tokenizer=tokenizer, metric="logit_difference", targets=(good, bad)
            ... )
            >>> print(vector.to_markdown())  # doctest: +SKIP
            >>> with vector.apply(model, strength=2.0):  # doctest: +SKIP
            ...     model.generate(**tokens)
        """
        return discover(
            model,
            positive,
            negative,
            layer,
            method,
            positions=positions,
            held_out=held_out,
            seed=seed,
            metric=metric,
            targets=targets,
            strengths=strengths,
            apply_positions=apply_positions,
            metric_positions=metric_positions,
            max_norm=max_norm,
            steps=steps,
            tokenizer=tokenizer,
            batch_size=batch_size,
            confidence=confidence,
            resamples=resamples,
            resampling_seed=resampling_seed,
            progress=progress,
        )

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
