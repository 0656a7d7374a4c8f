"""`copying_scores`: whether what a head moves makes the token that is moved likelier, read off the weights.

N. Elhage et al., "A Mathematical Framework for Transformer Circuits", 2021: positive eigenvalues of the full OV circuit
`W_E W_V W_O W_U` `[word, word]` are what copying looks like. The product has as many eigenvalues that are not 0 as a
head has features, those of `W_O (W_U W_E) W_V`, so that the large matrix is never made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from freeze_core.activations import LayerActivations
from freeze_core.attention.layout import AttentionSite, Sites
from freeze_core.attention.shards import unsharded
from freeze_core.circuits.heads import Factored
from freeze_core.circuits.linear import Affine, pulled_back, wide
from freeze_core.circuits.maps import layer_around, norm_before, reading_map, writing_map
from freeze_core.circuits.measures import HeadMeasures
from freeze_core.circuits.moved import not_moved, recorded
from freeze_core.circuits.norms import folded
from freeze_core.circuits.observing import Flow, device_of, observed, same, source_of, undisturbed
from freeze_core.config import InterventionConfig
from freeze_core.errors import UnsupportedModelError
from freeze_core.freezing.requests import resolve
from freeze_core.freezing.unfrozen import unfrozen_sites

__all__ = ["copying_scores"]

AT_ONCE = 256
"""Rows of the product of embedding and unembedding that are made at once."""


def copying_scores(model: nn.Module, layers: Sequence[int] | None = None) -> HeadMeasures:
    """The sum of the eigenvalues of each head's full OV circuit over the sum of their magnitudes, in [-1, 1].

    1 is a head that only copies, -1 one that only makes what it sees less likely, however much it moves. The norm
    before the attention and the one before the unembedding are taken for the linear maps that they are but for a
    division, by a number that is positive and so does not change the score; where there is none, none is. Position
    embeddings, what other layers do to the residual stream, and norms behind the attention play no part.

    Args:
        model: unfrozen, with embeddings of words and logits of as many features as the residual stream.
        layers: decoder layers, negative ones count from the end; `None` is all that have attention.

    Returns:
        `HeadMeasures` with the one measure `copying`; nan of heads whose OV circuit is no matrix, or 0.

    Raises:
        UnsupportedModelError: the model cannot be served, has no unembedding that reads the residual stream, but for a
            norm, or no head whose OV circuit is a matrix.
        InterventionError: a layer that is out of range, or a frozen model.
    """
    with torch.inference_mode(False):  # whose tensors have no derivatives
        sites = unfrozen_sites(model)
        chosen = [sites.by_layer[freeze.layer] for freeze in resolve(InterventionConfig(layers), sites)]
        scores = _scores(model, sites, chosen)
    about = (
        f"{type(model).__name__}: sum of the eigenvalues of W_E W_V W_O W_U over the sum of their magnitudes, of each "
        "head (layer.head), with the linear parts of the norms before attention and unembedding."
    )
    return HeadMeasures({"copying": scores}, 0, "signed share of eigenvalues", about)


def _scores(model: nn.Module, sites: Sites, chosen: Sequence[AttentionSite]) -> Tensor:
    """`[layer, head]` in float64."""
    flows = observed(model, model.modules())
    seen = recorded(model, [site.layer for site in chosen], "self")
    reasons: list[str] = []
    scores = torch.full((sites.layers, max(site.heads for site in chosen)), torch.nan, dtype=torch.float64)
    with undisturbed(model):
        words = _unembedded(model, flows, _streams(model, sites, flows))
        for site in chosen:
            inside = {one: flows[one] for one in layer_around(model, sites, site).modules() if one in flows}
            with unsharded(model, inside):
                for head in range(site.heads):
                    try:
                        scores[site.layer, head] = _score(site, head, seen[site.layer], inside, words)
                    except UnsupportedModelError as error:
                        reasons.append(str(error))
    if reasons and bool(scores.isnan().all()):
        raise UnsupportedModelError(reasons[0])
    return scores


def _score(
    site: AttentionSite, head: int, seen: LayerActivations, flows: Mapping[nn.Module, Flow], words: Tensor
) -> float:
    if reason := not_moved(site, head, seen):
        raise UnsupportedModelError(reason)
    values = reading_map(site, head, "v", flows, norm_before(site, "v", flows)).weight
    output = writing_map(site, head, flows).weight
    if len(values) != len(words):
        raise UnsupportedModelError(
            f"{site.name} reads {len(values)} features where words are embedded in {len(words)}: there is no circuit "
            "from word to word"
        )
    found = Factored(values, output @ words.to(output)).eigenvalues()
    return float(found.real.sum() / found.abs().sum())


def _streams(model: nn.Module, sites: Sites, flows: Mapping[nn.Module, Flow]) -> list[Tensor]:
    """What the decoder layers give, attention or not, and what the parts of them do where each part has a list."""
    inside = layer_around(model, sites, sites.by_layer[max(sites.by_layer)])
    lists = [list(one) for one in model.modules() if isinstance(one, nn.ModuleList)]
    layers = {len(one) for one in lists if inside in one}
    return [flows[part].given for one in lists if len(one) in layers for part in one if part in flows]


def _unembedded(model: nn.Module, flows: dict[nn.Module, Flow], streams: Sequence[Tensor]) -> Tensor:
    """What is written to the residual stream as words, and those as their embeddings: `W_U W_E` `[hidden, hidden]`.

    Raises:
        UnsupportedModelError: one of the two is missing, or of other features than the residual stream, or something
            else than a norm lies between that and the unembedding.
    """
    getters: Any = model
    embedding, unembedding = (
        getter() if (getter := getattr(getters, name, None)) else None
        for name in ("get_input_embeddings", "get_output_embeddings")
    )
    if embedding is None or unembedding is None or unembedding not in flows:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no embedding and unembedding of words (get_input_embeddings, "
            "get_output_embeddings): there is no circuit from word to word"
        )
    like = flows[unembedding].taken[0]
    with torch.no_grad(), unsharded(model, [embedding]):
        every = torch.arange(flows[unembedding].given.shape[-1], device=device_of(embedding))
        words = embedding(every[None])[0].to(like)
    norm = source_of(like, flows)
    taken = like if norm is None else flows[norm].taken[0]
    if words.shape[1] != taken.shape[-1]:
        raise UnsupportedModelError(
            f"embeddings of {words.shape[1]} features and a residual stream of {taken.shape[-1]}: they are projected"
        )
    # A norm that ends the last layer is itself in what that gives.
    if not any(same(one, stream) for one in (taken, like) for stream in streams):
        raise UnsupportedModelError(
            f"what the unembedding of {type(model).__name__} reads, or the norm before it, is not what the last layer "
            "gives: something else comes between (a dense layer of the head, say, or a scale), so that W_U is not the "
            "unembedding alone"
        )
    with unsharded(model, [unembedding, norm] if norm else [unembedding]):
        made = torch.cat([pulled_back(unembedding, like, some) for some in words.T.split(AT_ONCE)])
        if norm is not None:
            made = folded(norm, taken, Affine(made.T, made.new_zeros(len(made)))).weight.T
    return wide(made.T)
