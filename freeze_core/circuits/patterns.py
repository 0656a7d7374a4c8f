"""`pattern_scores`: what heads attend to on random tokens that come twice, by which the field names them.

Prefix matching: C. Olsson et al., "In-context Learning and Induction Heads", 2022. On random tokens nothing but the
repetition can be made use of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from freeze_core.arguments import check_flag, check_int, is_int, refuse
from freeze_core.attention.layout import Sites
from freeze_core.attention.sites import find_sites
from freeze_core.circuits.measures import HeadMeasures
from freeze_core.circuits.observing import arguments_of, device_of
from freeze_core.config import InterventionConfig
from freeze_core.errors import InterventionError
from freeze_core.freezing.requests import resolve
from freeze_core.inputs import vocabulary_size
from freeze_core.recording import record
from freeze_core.results.intervals import Resampling

__all__ = ["pattern_scores"]

MEASURES = ("prefix_matching", "duplicate_token", "previous_token", "first_token")


def pattern_scores(
    model: nn.Module,
    tokens: int = 50,
    n: int = 20,
    *,
    layers: Sequence[int] | None = None,
    first: int | None = None,
    seed: int = 0,
    batch_size: int = 4,
    confidence: float = 0.95,
    resamples: int = 9_999,
    resampling_seed: int = 0,
    progress: bool = True,
) -> HeadMeasures:
    """The share of its attention that each head gives, on sequences of distinct random tokens that come twice, to

    - `prefix_matching`: from a token's second time, the token after its first time (induction heads);
    - `duplicate_token`: from a token's second time, its first time;
    - `previous_token`: from any token but the first, the one before it;
    - `first_token`: from any token but the first, the first (a sink).

    Each is the mean over such tokens of a sequence, then over sequences, in [0, 1]. A model that is frozen is looked at
    as it is; of an encoder and a decoder, the decoder, while both are given the same. It runs in its own mode, without
    gradients, under its own and under eager attention.

    Args:
        model: with self-attention whose patterns can be recorded.
        tokens: how many are drawn; a sequence has twice as many.
        n: sequences, 2 at least, for the intervals.
        layers: decoder layers, negative ones count from the end; `None` is all that have attention.
        first: a token to put before all others, such as the one that the model was trained to begin with.
        seed: of the tokens.
        batch_size: sequences that are run at once.
        confidence, resamples, resampling_seed: of the expanded percentile bootstrap intervals over sequences.
        progress: show a bar.

    Raises:
        UnsupportedModelError: the model cannot be served, or forms no patterns.
        InterventionError: an argument that is not allowed, before anything is run.
        ImportError: scipy is not installed.

    Example:
        >>> pattern_scores(model).top("prefix_matching", 5)  # doctest: +SKIP
    """
    for name, value, least in (("tokens", tokens, 2), ("n", n, 2), ("seed", seed, 0), ("batch_size", batch_size, 1)):
        check_int(name, value, least)
    check_flag("progress", progress)
    resampling = Resampling(confidence, resamples, resampling_seed)
    sites = find_sites(model)
    chosen = [freeze.layer for freeze in resolve(InterventionConfig(layers), sites)]
    ids = _repeated(model, tokens, n, first, seed)
    found = _measured(model, sites, chosen, ids.split(batch_size), tokens, progress)
    ends = {measure: resampling.mean_intervals(found[measure]) for measure in MEASURES}
    return HeadMeasures(
        {measure: found[measure].mean(-1) for measure in MEASURES},
        n,
        "share of attention",
        f"{type(model).__name__}: mean attention of each head (layer.head) on {tokens} distinct random tokens that "
        f"come twice; n = {n} sequences. {resampling.note('sequences')}.",
        {measure: low for measure, (low, _) in ends.items()},
        {measure: high for measure, (_, high) in ends.items()},
    )


def _repeated(model: nn.Module, tokens: int, n: int, first: object, seed: int) -> Tensor:
    """Token ids `[n, first and twice tokens]`."""
    words = vocabulary_size(model)
    if words is None:
        raise InterventionError(
            f"{type(model).__name__} has no config that says vocab_size, so that no tokens are drawn"
        )
    if first is not None and not (is_int(first) and 0 <= first < words):
        refuse("first", first, f"None or one of {words} token ids")
    allowed = torch.tensor([word for word in range(words) if word not in _special(model, first)])
    if len(allowed) < tokens:
        raise InterventionError(
            f"tokens={tokens}: must be at most {len(allowed)}, since they are distinct and the model knows no more"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.stack([allowed[torch.randperm(len(allowed), generator=generator)[:tokens]] for _ in range(n)])
    begin = torch.empty(n, 0, dtype=torch.long) if first is None else torch.full((n, 1), first)
    return torch.cat([begin, drawn, drawn], dim=1).to(device_of(model))


def _special(model: nn.Module, first: object) -> set[Any]:
    """Tokens that stand for no word."""
    config: Any = model.config
    found: set[Any] = {first}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        found.update(value if isinstance(value, list) else [value])
    return found


def _measured(
    model: nn.Module, sites: Sites, chosen: Sequence[int], batches: Sequence[Tensor], tokens: int, progress: bool
) -> dict[str, Tensor]:
    """By measure `[layer, head, sequence]` in float64."""
    heads = max(site.heads for site in sites.by_layer.values())
    rows = sum(map(len, batches))
    found = {measure: torch.full((sites.layers, heads, rows), torch.nan, dtype=torch.float64) for measure in MEASURES}
    start = 0
    for batch in tqdm(batches, desc="pattern scores", unit="batch", disable=not progress):
        seen = record(model, arguments_of(model, batch), chosen, pattern=True)
        for layer in chosen:
            pattern = seen[layer].pattern
            assert pattern is not None
            if pattern.dim() > 4:
                raise InterventionError(f"layer {layer} runs several times in a pass: it has no one pattern")
            for measure, values in _of_pattern(pattern, tokens).items():
                found[measure][layer, : pattern.shape[1], start : start + len(batch)] = values.T
        start += len(batch)
    return found


def _of_pattern(pattern: Tensor, tokens: int) -> dict[str, Tensor]:
    """The measures `[row, head]` of a pattern `[row, head, token, key]`, in float64."""
    length = pattern.shape[-1]
    every, second = torch.arange(1, length), torch.arange(length - tokens, length)

    def mean(query: Tensor, key: Tensor) -> Tensor:
        return pattern[:, :, query, key].double().mean(-1).cpu()

    return {
        "prefix_matching": mean(second, second - tokens + 1),
        "duplicate_token": mean(second, second - tokens),
        "previous_token": mean(every, every - 1),
        "first_token": mean(every, torch.zeros_like(every)),
    }
