"""Studies: what freezes of a model change over a data set, with intervals."""

from freeze_core.studies.ablation import run_circuit_ablation_study
from freeze_core.studies.results import AblationStudy

__all__ = ["AblationStudy", "run_circuit_ablation_study"]
