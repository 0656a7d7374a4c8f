"""Whether LaTeX takes a table."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def typeset(tables: str, folder: Path) -> None:
    """Fails where pdflatex does not take the tables; skips where it is not installed."""
    head, end = "\\documentclass{article}\n\\usepackage{booktabs}\n\\begin{document}\n", "\\end{document}\n"
    (folder / "paper.tex").write_text(head + tables + end, encoding="utf-8")
    command = shutil.which("pdflatex")
    if command is None:
        pytest.skip("pdflatex is not installed (Debian: texlive-latex-recommended)")
    done = subprocess.run([command, "-halt-on-error", "paper.tex"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
