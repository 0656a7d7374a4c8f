"""For all tests: pytest inside pytest, and no reaching out."""

from __future__ import annotations

import os

pytest_plugins = ["pytester"]

# A hub id that is not in the local cache is then refused at once, where it would be retried for half a minute.
os.environ["HF_HUB_OFFLINE"] = "1"
