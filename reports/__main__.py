"""Reports from the command line.

python -m pytest_circuitfreeze.reports render FOLDER          # every face anew, of the folder's report.json
python -m pytest_circuitfreeze.reports compare OLD NEW        # what changed, and what got slower
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pytest_circuitfreeze import reports
from pytest_circuitfreeze.reports.compare import compare
from pytest_circuitfreeze.reports.compare import render as render_comparison

COMMAND = "python -m pytest_circuitfreeze.reports"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0; 1 where the new run of a comparison is worse than the old one; 2 where a report cannot be read or written.
    """
    parser = argparse.ArgumentParser(prog=COMMAND, description="Makes documents of report.json, and compares runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    text = "write report.md, report.html, the LaTeX tables and the plots anew"
    rendering = commands.add_parser("render", help=text, description=text)
    rendering.add_argument("report", type=Path, help=f"a {reports.DOCUMENT}, or the folder that it is in")
    rendering.add_argument("--into", type=Path, metavar="FOLDER", help="where to write; default: beside the document")
    text = "tell what differs between two runs; the status is 1 where the new one is worse"
    comparing = commands.add_parser("compare", help=text, description=text)
    comparing.add_argument("old", type=Path, help=f"a {reports.DOCUMENT}, or the folder that it is in")
    comparing.add_argument("new", type=Path, help="another one")
    chosen = parser.parse_args(arguments)
    try:
        return _render(chosen) if chosen.command == "render" else _compare(chosen)
    except (reports.ReportError, OSError) as error:
        print(f"{COMMAND}: {error}", file=sys.stderr)
        return 2


def _render(chosen: argparse.Namespace) -> int:
    source = _document(chosen.report)
    report = reports.read(source)
    folder = chosen.into or source.parent
    folder.mkdir(parents=True, exist_ok=True)
    for path in reports.render(report, folder):
        print(path)
    if not reports.plots.available():
        print(f"no plots, which need matplotlib ({reports.plots.EXTRA})")
    return 0


def _compare(chosen: argparse.Namespace) -> int:
    found = compare(reports.read(_document(chosen.old)), reports.read(_document(chosen.new)))
    print(render_comparison(found) or "nothing differs beyond the noise\n", end="")
    return int(found.worse)


def _document(path: Path) -> Path:
    return path / reports.DOCUMENT if path.is_dir() else path


if __name__ == "__main__":
    sys.exit(main())
