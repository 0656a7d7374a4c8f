"""Figures of results: each a `matplotlib.figure.Figure` of its own, to be shown in a notebook or saved by `savefig`.

None goes through pyplot, so that no window opens and none is kept. All read as well in grey and to the colour-blind:
what is negative is darker and what is positive lighter than 0, and lines differ in their dashes and markers.
"""

from freeze_core.plots.curves import plot_effect_by_strength, plot_vector_effect
from freeze_core.plots.gradients import plot_gradient_flow
from freeze_core.plots.heads import plot_head_measures, plot_head_scores
from freeze_core.plots.heatmap import plot_heatmap
from freeze_core.plots.patterns import plot_patterns
from freeze_core.plots.studies import plot_ablation

__all__ = [
    "plot_ablation",
    "plot_effect_by_strength",
    "plot_gradient_flow",
    "plot_head_measures",
    "plot_head_scores",
    "plot_heatmap",
    "plot_patterns",
    "plot_vector_effect",
]
