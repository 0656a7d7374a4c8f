"""Studies: what freezes of a model change over a data set, with intervals."""

from freeze_core.studies.ablation import run_circuit_ablation_study
from freeze_core.studies.ablation_result import AblationStudy
from freeze_core.studies.faithfulness import measure_faithfulness
from freeze_core.studies.faithfulness_result import Faithfulness
from freeze_core.studies.patching import patch_activations
from freeze_core.studies.patching_result import PatchingStudy

__all__ = [
    "AblationStudy",
    "Faithfulness",
    "PatchingStudy",
    "measure_faithfulness",
    "patch_activations",
    "run_circuit_ablation_study",
]
