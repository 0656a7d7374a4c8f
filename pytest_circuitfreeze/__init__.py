"""A pytest plugin that proves what freezing attention circuits does; see ``pytest --help`` under *circuitfreeze*."""

from __future__ import annotations

import pytest

__version__ = "0.1.0"

# The shipped suites live outside this package's folder in a checkout, where pytest would not rewrite their
# assertions of its own accord.
pytest.register_assert_rewrite("pytest_circuitfreeze.suites")
