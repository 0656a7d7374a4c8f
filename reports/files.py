"""Writes a report's files, each whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from pytest_circuitfreeze.reports import markdown
from pytest_circuitfreeze.reports.document import read


def write(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes ``report.json``, and from that file ``report.md``; returns their paths.

    Raises:
        OSError: the folder cannot be made or written into.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "report.json"
    # Strict JSON: a number that is not finite would be unreadable to other programs.
    _replace(source, json.dumps(document, indent=2, allow_nan=False) + "\n")
    shown = folder / "report.md"
    _replace(shown, markdown.render(read(source)))
    return [source, shown]


def _replace(path: Path, text: str) -> None:
    """Puts ``text`` in place of the file in one step, so that a reader never sees half of it."""
    with NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=path.name, delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(text)
            file.close()
            # Temporary files are private; a report is as readable as any file that its writer makes.
            mask = os.umask(0)
            os.umask(mask)
            temporary.chmod(0o666 & ~mask)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
