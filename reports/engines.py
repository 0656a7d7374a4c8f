"""The engines' matrix: every built-in engine by every claim, with what fails, by how much, and what is not offered.

    python -m pytest_circuitfreeze.reports.engines docs/engines [engine ...]

runs the shipped suites on the default architectures with each engine, in a process of its own, and writes
`engines.json` and `engines.md`. Engines that are named replace theirs in a matrix that is there, so that each may be
run where its library is installed. Where a failure comes from is said by hand, in `notes.json`: by engine and claim,
one line.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from typing import Any

from tabulate import tabulate

from pytest_circuitfreeze import matrix
from pytest_circuitfreeze.engines import BUILT_IN, EXTRAS
from pytest_circuitfreeze.reports.compatibility import run_suites
from pytest_circuitfreeze.reports.document import Report
from pytest_circuitfreeze.results import Result

COMMAND = "python -m pytest_circuitfreeze.reports.engines"
SECONDS = 7200
"""Time limit for each engine."""
FINDING = 300
"""Characters of a finding that are shown."""
MARKS = {"pass": "✓", "pass*": "✓*", "in part": "◐", "not offered": "-", "FAIL": "✗", "ERROR": "✗", "n/a": "n/a"}
SHARED = (
    "What an activation is replaced by is worked out by the same code for all engines but freeze_core. What differs, "
    "and is judged, is what a library makes of it: whether it is in force, where, in which passes, what it does to "
    "gradients, and what is left of it."
)
LEGEND = (
    "✓ passes; ◐ passes as far as the engine offers it; - is not offered; ✗ fails; n/a says nothing about this engine "
    "or cannot be judged. One mark stands for all models, several for one each: {models}. Reasons are below."
)


def entry(engine: str, report: Report) -> dict[str, Any]:
    """What the matrix holds of one engine, as plain data."""
    results = report.results
    models = matrix.columns(results, report.targets)
    extra = EXTRAS.get(engine)
    return {
        "library": f"{extra} {version(extra)}" if extra else "",
        "environment": dict(report.environment),
        "profile": report.settings["profile"],
        "seed": report.settings["seed"],
        "models": list(models),
        "seconds": round(sum(result.seconds for result in results)),
        "examples": sum(result.examples for result in results),
        "total": matrix.totals(results).splitlines()[0],
        "claims": {row.claim: dict(zip(models, row.cells, strict=True)) for row in matrix.rows(results, models)},
        "sentences": {result.claim: result.sentence for result in results},
        "failures": [_failure(result) for result in results if result.outcome in ("failed", "error")],
        "reasons": matrix.reasons(results),
    }


def _failure(result: Result) -> dict[str, Any]:
    arguments: Mapping[str, str] = (result.failure or {}).get("arguments", {})
    return {
        "claim": result.claim,
        "model": result.model,
        "finding": result.message,
        "example": {name: _plain(code) for name, code in arguments.items() if name not in ("model", "engine")},
    }


def _plain(code: str) -> str:
    """An argument in one line."""
    return " ".join(code.split())


def render(made: Mapping[str, Any], notes: Mapping[str, Mapping[str, str]]) -> str:
    """The matrix as Markdown."""
    engines: Mapping[str, Any] = made["engines"]
    models = next(iter(engines.values()))["models"]
    sentences = {claim: text for one in engines.values() for claim, text in one["sentences"].items()}
    ran = [
        [
            name,
            one["library"] or "-",
            *(one["environment"][what] for what in ("transformers", "torch", "hypothesis")),
            f"{one['profile']}, seed {one['seed']}",
            f"{one['examples']:,}",
            f"{one['seconds'] / 60:.0f}",
        ]
        for name, one in engines.items()
    ]
    heads = ["engine", "library", "transformers", "torch", "hypothesis", "profile", "examples", "minutes"]
    marks = [
        [text, *(_mark(one["claims"].get(claim, {})) for one in engines.values())] for claim, text in sentences.items()
    ]
    parts = [
        "# Engines by claims",
        f"Made by `{COMMAND} docs/engines`, on {', '.join(models)}.",
        _table(ran, heads),
        SHARED,
        LEGEND.format(models=", ".join(models)),
        _table(marks, ["claim", *engines]),
    ]
    for name, one in engines.items():
        parts += [f"## {name}", one["total"] + ".", *_failures(one["failures"], notes.get(name, {}))]
        told = [line for line in one["reasons"] if " not offered" in line or "cannot be judged" in line]
        parts += ["Not offered, or not to be judged:", "\n".join(f"- {_escape(line)}" for line in told)] if told else []
    return "\n\n".join(parts) + "\n"


def _mark(cells: Mapping[str, str]) -> str:
    marks = [MARKS.get(cell, cell) for cell in cells.values()]
    return (marks[0] if len(set(marks)) == 1 else " ".join(marks)) if marks else "-"


def _failures(failures: Sequence[Mapping[str, Any]], notes: Mapping[str, str]) -> list[str]:
    """A list: each claim that fails with its note, and what was found on the first model that it fails on."""
    lines = []
    for claim in dict.fromkeys(failure["claim"] for failure in failures):
        own = [failure for failure in failures if failure["claim"] == claim]
        on = ", ".join(str(failure["model"]) for failure in own)
        lines.append(f"- **{matrix.words(claim)}** ({on}): {notes.get(claim, 'not looked into')}")
        lines.append(f"  - {own[0]['model']}: {_escape(shorten(own[0]['finding'], FINDING))}")
        lines += [f"    - {name}: `{code}`" for name, code in own[0]["example"].items()]
    return ["Fails:", "\n".join(lines)] if lines else []


def _table(rows: Iterable[Sequence[str]], heads: Sequence[str]) -> str:
    return tabulate([*rows], heads, tablefmt="github", disable_numparse=True)


def _escape(text: str) -> str:
    return " ".join(re.sub(r"([\\|*_`<\[\]])", r"\\\1", text).split())


def stale(made: Mapping[str, Any], notes: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Notes about what does not fail (any more)."""
    failing = {name: {failure["claim"] for failure in one["failures"]} for name, one in made["engines"].items()}
    return [f"{name}: {claim}" for name, own in notes.items() for claim in own if claim not in failing.get(name, set())]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs, writes, and fails if a run did not end or a note is about what does not fail."""
    parser = argparse.ArgumentParser(prog=COMMAND)
    parser.add_argument("folder", type=Path, help="where the matrix is written, beside notes.json")
    parser.add_argument("names", nargs="*", help="engines, by default all that are built in")
    parser.add_argument("--profile", default="standard", help="how many examples each claim gets")
    parser.add_argument(
        "--render", action="store_true", help="run nothing: write engines.md of engines.json and the notes"
    )
    chosen = parser.parse_intermixed_args(arguments)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    path, notes_path = chosen.folder / "engines.json", chosen.folder / "notes.json"
    made: dict[str, Any] = {"engines": {}}
    if path.exists():
        made = json.loads(path.read_text(encoding="utf-8"))
    dead = []
    for name in () if chosen.render else chosen.names or BUILT_IN:
        report = run_suites(["--circuitfreeze-engine", name, "--circuitfreeze-profile", chosen.profile], SECONDS)
        if report is None:
            dead.append(name)
            continue
        made["engines"][name] = entry(name, report)
        made["engines"] = {one: made["engines"][one] for one in BUILT_IN if one in made["engines"]}
        path.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        print(name, made["engines"][name]["total"], flush=True)
    notes = json.loads(notes_path.read_text(encoding="utf-8")) if notes_path.exists() else {}
    if made["engines"]:
        path.with_suffix(".md").write_text(render(made, notes), encoding="utf-8")
    for name in dead:
        print(f"{name}: the run did not end in time, or died")
    for note in stale(made, notes):
        print(f"note about what does not fail: {note}")
    return int(bool(dead or stale(made, notes)))


if __name__ == "__main__":
    sys.exit(main())
