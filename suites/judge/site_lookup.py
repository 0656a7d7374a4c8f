"""The attention layers of any model as the judge sees them: by heart in families that it knows, found out elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from pytest_circuitfreeze.suites.judge.head_discovery import discover_sites
from pytest_circuitfreeze.suites.judge.judged_sites import Site
from pytest_circuitfreeze.suites.judge.known_families import has_plain_projections, is_known, known_sites
from pytest_circuitfreeze.suites.tolerance import original

__all__ = ["implementations", "sites", "sites_without_formula", "tied_parameters", "without_formulas"]

_WITHOUT_FORMULAS: ContextVar[bool] = ContextVar("judged by what modules take and give alone", default=False)
_FOUND: WeakKeyDictionary[nn.Module, dict[int, Site]] = WeakKeyDictionary()


def sites(model: PreTrainedModel) -> dict[int, Site]:
    """The attention layers of `model` by decoder layer. Ask before a freeze: a freeze may change attributes.

    Raises:
        CannotJudge: none can be told, by heart or by discovery.
    """
    return sites_without_formula(model) if _WITHOUT_FORMULAS.get() else _known_or_found(model)


@contextmanager
def without_formulas() -> Iterator[None]:
    """Takes no formula for granted for the length of the block: for an engine that runs an attention of its own."""
    token = _WITHOUT_FORMULAS.set(True)
    try:
        yield
    finally:
        _WITHOUT_FORMULAS.reset(token)


def sites_without_formula(model: PreTrainedModel) -> dict[int, Site]:
    """The same layers, each to be judged by what its modules take and give alone.

    That is enough to record, and to run the attention again, however often it ran.
    """
    return {layer: replace(site, formula=None) for layer, site in _known_or_found(model).items()}


def _known_or_found(model: PreTrainedModel) -> dict[int, Site]:
    if is_known(model):
        by_heart = known_sites(model)
        # A copy that is off by rounding has hooks of ours on its projections, and is looked at as the model is.
        if all(has_plain_projections(site) for site in known_sites(original(model) or model).values()):
            return by_heart
        return {layer: replace(site, formula=None) for layer, site in by_heart.items()}
    if model not in _FOUND:
        source = original(model)
        # In a copy that is off by rounding everything lies where it lies in the model.
        _FOUND[model] = (
            discover_sites(model)
            if source is None
            else {layer: site.moved_to(model) for layer, site in _known_or_found(source).items()}
        )
    return dict(_FOUND[model])


def implementations(model: PreTrainedModel) -> tuple[str, ...]:
    """The attention implementations, of `sdpa` and `eager`, that the model's class has; the one to run first.

    Where an engine attends by itself, that is compared with eager attention.
    """
    supported = any(getattr(module, "_supports_sdpa", False) for module in model.modules())
    return ("sdpa", "eager") if supported and not _WITHOUT_FORMULAS.get() else ("eager",)


def tied_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that several modules use: what is seen of them is not one layer's doing."""
    named = Counter(parameter for _, parameter in model.named_parameters(remove_duplicate=False))
    return {parameter for parameter, names in named.items() if names > 1}
