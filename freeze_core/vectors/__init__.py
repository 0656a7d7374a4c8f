"""Intervention vectors: directions of the residual stream, found in prompts, judged on others, and added to a model."""

from freeze_core.vectors.vector import InterventionVector

__all__ = ["InterventionVector"]
