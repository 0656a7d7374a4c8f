"""Says which Python is needed, where pip itself would not.

The metadata in pyproject.toml require Python 3.11. With constraints.txt an older pip looks for the pinned versions
first, finds none for an older Python, and reports a conflict between pins instead of the Python version.
"""

from __future__ import annotations

import sys

from setuptools import setup

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(
        f"pytest-circuitfreeze needs Python 3.11 or newer, and this is Python {sys.version.split()[0]}: make the "
        "virtual environment anew with a newer one, such as python3.11 or python3.13"
    )

setup()
