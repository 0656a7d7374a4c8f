"""Scores of heads: how much a metric changes when each head's circuit alone is frozen."""

from freeze_core.scoring.head_sweep import score_heads
from freeze_core.scoring.scores import HeadScores

__all__ = ["HeadScores", "score_heads"]
