"""Lets the tests under running conditions import what they share, which importlib mode alone would not."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
