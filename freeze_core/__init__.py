"""Freezes the QK circuit (where a head looks) or the OV circuit (what it moves) of chosen attention heads."""

from freeze_core.circuits import HeadCircuits, HeadMeasures, copying_scores, head_circuits, pattern_scores
from freeze_core.config import InterventionConfig
from freeze_core.errors import (
    CircuitFreezeError,
    FreezeNotInForceError,
    InterventionError,
    StaleCacheWarning,
    UnsupportedModelError,
)
from freeze_core.freezer import AttentionCircuitFreezer, freeze_ov_circuit, freeze_qk_circuit
from freeze_core.interventions import ExperimentalInterventions
from freeze_core.scoring import HeadScores, score_heads
from freeze_core.studies import (
    AblationStudy,
    Faithfulness,
    PatchingStudy,
    measure_faithfulness,
    patch_activations,
    run_circuit_ablation_study,
)
from freeze_core.vectors import InterventionVector
from freeze_core.vocabulary import BackwardMode, CircuitType, FreezeType, KVScope, ModelArchitecture

__all__ = [
    "AblationStudy",
    "AttentionCircuitFreezer",
    "BackwardMode",
    "CircuitFreezeError",
    "CircuitType",
    "ExperimentalInterventions",
    "Faithfulness",
    "FreezeNotInForceError",
    "FreezeType",
    "HeadCircuits",
    "HeadMeasures",
    "HeadScores",
    "InterventionConfig",
    "InterventionError",
    "InterventionVector",
    "KVScope",
    "ModelArchitecture",
    "PatchingStudy",
    "StaleCacheWarning",
    "UnsupportedModelError",
    "copying_scores",
    "freeze_ov_circuit",
    "freeze_qk_circuit",
    "head_circuits",
    "measure_faithfulness",
    "patch_activations",
    "pattern_scores",
    "run_circuit_ablation_study",
    "score_heads",
]
