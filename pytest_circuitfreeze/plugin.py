"""Options, collection and reporting of ``pytest --circuitfreeze``."""

from __future__ import annotations
