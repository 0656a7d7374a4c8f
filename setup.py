"""Says which Python is needed, where pip itself would not.

The metadata in pyproject.toml require Python 3.11. With constraints.txt an older pip looks for the pinned versions
first, finds none for an older Python, and reports a conflict between pins instead of the Python version.

Older Pythons must be able to read this file: it has no annotations and no f-strings.
"""

import sys

from setuptools import setup

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(
        "pytest-circuitfreeze needs Python 3.11 or newer, and this is Python %s: make the virtual environment anew "  # noqa: UP031
        "with a newer one, such as python3.11 or python3.13" % sys.version.split()[0]
    )

setup()
