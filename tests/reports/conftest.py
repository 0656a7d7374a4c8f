"""What the tests of reports share."""

from __future__ import annotations

import sys
from pathlib import Path

# Test files are imported by their paths; what they share is not found that way.
sys.path.append(str(Path(__file__).parent))
