"""What a head is by its weights, and what it does by its patterns: so that a head that is frozen can be named."""

from freeze_core.circuits.copying import copying_scores
from freeze_core.circuits.heads import Factored, HeadCircuits, head_circuits
from freeze_core.circuits.measures import HeadMeasures
from freeze_core.circuits.patterns import pattern_scores

__all__ = ["Factored", "HeadCircuits", "HeadMeasures", "copying_scores", "head_circuits", "pattern_scores"]
