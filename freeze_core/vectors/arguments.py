"""What is asked of a vector, checked before anything is run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

from freeze_core.errors import InterventionError, shown
from freeze_core.freezing.padding_mask import prompt_of
from freeze_core.vectors.methods import CLOSED
from freeze_core.vectors.positions import Positions
from freeze_core.vectors.prompts import Prompts
from freeze_core.vectors.sites import ResidualSite

__all__ = ["check_columns", "check_method", "check_reached", "check_running", "checked_strengths"]


def check_columns(site: ResidualSite, positions: Positions) -> None:
    """Raises `InterventionError` for columns in a model whose passes have other ones than their tokens."""
    if not isinstance(positions.given, str) and prompt_of(site.sites.stack):
        raise InterventionError(
            f"positions={positions}: {type(site.sites.stack).__name__} puts tokens of its own before those that it is "
            "given, so that columns cannot be told: must be 'all' or 'last'"
        )


def check_reached(positions: Positions, prompts: Prompts, rows: Sequence[int]) -> None:
    """Raises `InterventionError` for listed columns that one of these prompts has not, or has padding in."""
    if isinstance(positions.given, tuple):
        prompts.batches(rows, positions.given)


def checked_strengths(strengths: object, name: str = "strengths") -> tuple[float, ...]:
    """Finite numbers, no two the same.

    Raises:
        InterventionError: something else.
    """
    if isinstance(strengths, str | bytes) or not isinstance(strengths, Sequence) or not strengths:
        raise InterventionError(f"{name}={shown(strengths)}: must be a list of finite numbers, not empty")
    for one in strengths:
        if isinstance(one, bool) or not isinstance(one, Real) or not math.isfinite(one):
            raise InterventionError(f"{name}={shown(one)}: must be a finite number")
    if len(set(strengths)) < len(strengths):
        raise InterventionError(f"{name}={shown(strengths)}: names the same one twice")
    return tuple(float(one) for one in strengths)


def check_running(batch_size: object, seed: object, progress: object) -> None:
    """Raises `InterventionError` for a batch size, a seed or a choice of a bar that is none."""
    for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
            raise InterventionError(f"{name}={shown(value)}: must be an int of {least} at least")
    if not isinstance(progress, bool):
        raise InterventionError(f"progress={shown(progress)}: must be True or False")


def check_method(method: object, metric: object, targets: object, max_norm: object, steps: object) -> None:
    """Raises `InterventionError` for a method that there is not, or options that it does not take."""
    methods = (*CLOSED, "optimised")
    if not isinstance(method, str) or method not in methods:
        raise InterventionError(f"method={shown(method)}: must be one of {', '.join(methods)}")
    if method == "optimised" and metric is None:
        raise InterventionError("metric=None: must be given with method='optimised', which raises it")
    if metric is None and targets is not None:
        raise InterventionError("targets: must be None without a metric, of which they would be")
    for name, value in (("max_norm", max_norm), ("steps", steps)):
        if value is not None and method != "optimised":
            raise InterventionError(f"{name}={shown(value)}: must be None with method={method!r}, which takes no steps")
    if max_norm is not None and (
        isinstance(max_norm, bool) or not isinstance(max_norm, Real) or not 0 < float(max_norm) < math.inf
    ):
        raise InterventionError(f"max_norm={shown(max_norm)}: must be None or a finite number over 0")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise InterventionError(f"steps={shown(steps)}: must be None or an int of 1 at least")
