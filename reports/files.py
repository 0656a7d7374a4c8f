"""Writes a report's files, each whole or not at all: the document first, and what is made of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from pytest_circuitfreeze.reports import html, latex, markdown, plots
from pytest_circuitfreeze.reports.document import Report, read

DOCUMENT = "report.json"


def write(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes ``report.json``, and from that file all others; returns their paths.

    Raises:
        OSError: the folder cannot be made or written into.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / DOCUMENT
    # Strict JSON: a number that is not finite would be unreadable to other programs.
    _replace(source, (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())
    return [source, *render(read(source), folder)]


def render(report: Report, folder: Path) -> list[Path]:
    """Writes what is made of a report, and takes away what a former one had and this one has nothing of.

    Raises:
        OSError: the folder cannot be written into.
    """
    drawn = {theme: plots.draw(report, theme) for theme in plots.THEMES} if plots.available() else {}
    made: dict[str, bytes | None] = {
        "report.md": _encoded(markdown.render(report)),
        "report.html": _encoded(html.render(report, html.pictures(drawn))),
        "claims.tex": _encoded(latex.claims(report)) if report.results else None,
        "benchmarks.tex": _encoded(latex.measured(report)) if report.benchmarks else None,
    }
    for name in plots.NAMES:
        files = drawn.get("light", {}).get(name, {})
        made |= {f"{name}.{kind}": files.get(kind) for kind in plots.KINDS}
    for name, content in made.items():
        if content is None:
            folder.joinpath(name).unlink(missing_ok=True)
        else:
            _replace(folder / name, content)
    return [folder / name for name, content in made.items() if content is not None]


def _encoded(text: str) -> bytes:
    """Text as UTF-8; what is none, a file name of another encoding, say, is told by its numbers."""
    return text.encode(errors="backslashreplace")


def _replace(path: Path, content: bytes) -> None:
    """Puts ``content`` in place of the file in one step, so that a reader never sees half of it."""
    path = path.resolve()  # what a link leads to, and not the link, is replaced
    with NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(content)
            file.close()
            # Temporary files are private; a report is as readable as any file that its writer makes.
            mask = os.umask(0)
            os.umask(mask)
            temporary.chmod(0o666 & ~mask)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
