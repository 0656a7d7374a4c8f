"""For all tests: pytest inside pytest, no reaching out, one thread."""

from __future__ import annotations

import os

pytest_plugins = ["pytester"]

# A hub id that is not in the local cache is then refused at once, where it would be retried for half a minute.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny tensors are slower in several threads, by far on a busy machine; read when torch is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
