"""How large the gradient is, layer by layer, under each backward mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from freeze_core.errors import InterventionError, shown
from freeze_core.plots.style import figure, lines

__all__ = ["layer_norms", "plot_gradient_flow"]

OF = {"parameters": "parameters", "activations": "sites"}
"""Where a report has the norms."""


def plot_gradient_flow(reports: Mapping[str, Mapping[str, Any]], of: str = "parameters", title: str = "") -> Any:
    """The norm of the gradient in each layer, a line for each backward mode; 0 is a level of its own at the foot.

    Args:
        reports: by backward mode (`stopgrad`, `ste`, `circuit_ste`) what `check_gradient_behavior` returned.
        of: `parameters`, of a layer's parameters together, or `activations`, of its frozen heads' before the freeze.
        title: of the figure.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        InterventionError: a report that is none, or has no gradient in any layer.
        ImportError: matplotlib is not installed.

    Example:
        >>> modes = ("stopgrad", "ste", "circuit_ste")  # doctest: +SKIP
        >>> reports = {
        ...     mode: freezer.check_gradient_behavior(model, ids, InterventionConfig([1], backward_mode=mode))
        ...     for mode in modes
        ... }  # doctest: +SKIP
        >>> plot_gradient_flow(reports)  # doctest: +SKIP
    """
    if not isinstance(reports, Mapping) or not reports:
        raise InterventionError(f"reports={shown(reports)}: must be what check_gradient_behavior returned, by its mode")
    norms = {str(mode): layer_norms(report, of) for mode, report in reports.items()}
    positive = [norm for by_layer in norms.values() for norm in by_layer.values() if norm > 0]
    floor = 10.0 ** np.floor(np.log10(min(positive))) if positive else 1e-3
    made = figure(6.4, 4.2)
    axis = made.subplots()
    for (mode, by_layer), line in zip(norms.items(), lines(list(norms)).values(), strict=True):
        axis.plot(list(by_layer), list(by_layer.values()), label=mode, markersize=6, fillstyle="none", **line._asdict())
    axis.set_yscale("symlog", linthresh=floor, linscale=0.4)
    axis.set_ylim(-0.15 * floor, 3 * max(positive, default=floor))
    axis.axhline(0, color="0.5", linewidth=0.8)
    axis.set_xlabel("layer")
    whose = "parameters" if of == "parameters" else "frozen activations"
    axis.set_ylabel(f"norm of the loss's gradient by {whose}\n(mean squared logit per unit)")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(title="backward mode (n = 1 batch)")
    if title:
        axis.set_title(title, wrap=True)
    return made


def layer_norms(report: Mapping[str, Any], of: str) -> dict[int, float]:
    """The norm of all gradients in each layer of a report.

    Raises:
        InterventionError: there is none.
    """
    key = OF.get(of)
    if key is None or not isinstance(report, Mapping) or key not in report:
        raise InterventionError(
            f"of={shown(of)}: must be one of {', '.join(OF)}, and reports what check_gradient_behavior returned"
        )
    squares: dict[int, float] = {}
    for name, facts in report[key].items():
        layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if layer is not None:
            for norm in _norms(facts):
                squares[layer] = squares.get(layer, 0.0) + norm**2
    if not squares:
        raise InterventionError(f"no {of} of the report have a gradient in a layer")
    return {layer: float(np.sqrt(squares[layer])) for layer in sorted(squares)}


def _norms(facts: Mapping[str, Any] | None) -> list[float]:
    """Of a parameter the norm of its gradient, if it has one, and of a projection those of its frozen heads."""
    if facts is None:
        return []
    return [head["norm"] for head in facts["heads"] if head["frozen"]] if "heads" in facts else [facts["norm"]]
