"""The table that a run ends with, as a test reads it."""

from __future__ import annotations

import pytest


def table(result: pytest.RunResult) -> list[str]:
    """The lines of the section, without its title."""
    lines = result.outlines
    start = next(place for place, line in enumerate(lines) if " circuitfreeze: " in line and line.startswith("==="))
    end = next(place for place in range(start + 1, len(lines)) if lines[place].startswith("==="))
    # pytest-benchmark may end it with an empty line.
    return lines[start + 1 : end - (not lines[end - 1])]
