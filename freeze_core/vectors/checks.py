"""What is asked of a vector, checked before anything is run."""

from __future__ import annotations

from collections.abc import Sequence

from freeze_core.arguments import check_choice, check_int, is_finite, refuse
from freeze_core.errors import InterventionError, shown
from freeze_core.freezing.padding_mask import prompt_of
from freeze_core.vectors.methods import CLOSED
from freeze_core.vectors.positions import Positions
from freeze_core.vectors.prompts import Prompts
from freeze_core.vectors.sites import ResidualSite

__all__ = ["check_columns", "check_method", "check_reached", "checked_strengths"]


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
        refuse(name, strengths, "a list of finite numbers, not empty")
    for one in strengths:
        if not is_finite(one):
            refuse(name, one, "a finite number")
    if len(set(strengths)) < len(strengths):
        raise InterventionError(f"{name}={shown(strengths)}: names the same one twice")
    return tuple(float(one) for one in strengths)


def check_method(method: object, metric: object, targets: object, max_norm: object, steps: object) -> None:
    """Raises `InterventionError` for a method that there is not, or options that it does not take."""
    check_choice("method", method, (*CLOSED, "optimised"))
    if method == "optimised" and metric is None:
        raise InterventionError("metric=None: must be given with method='optimised', which raises it")
    if metric is None and targets is not None:
        raise InterventionError("targets: must be None without a metric, of which they would be")
    for name, value in (("max_norm", max_norm), ("steps", steps)):
        if value is not None and method != "optimised":
            refuse(name, value, f"None with method={method!r}, which takes no steps")
    if max_norm is not None and not (is_finite(max_norm) and max_norm > 0):
        refuse("max_norm", max_norm, "None or a finite number over 0")
    check_int("steps", steps, 1, optional=True)
