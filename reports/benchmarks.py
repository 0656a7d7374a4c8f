"""The benchmarks' report: what a freeze costs beside the plain model, hooks by hand and other libraries.

    python -m pytest_circuitfreeze.reports.benchmarks docs/benchmarks [file ...]

runs the shipped benchmarks in a process of its own and writes `benchmarks.json`, `benchmarks.md` and, with matplotlib,
`benchmarks.svg`. Files that are named (`bench_forward.py`) replace theirs in a report that is there. Libraries that are
installed are measured too. What keeps a figure from its target is said by hand, in `notes.json`, by benchmark.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pytest_circuitfreeze.benchmarks import tables, verdict
from pytest_circuitfreeze.collect import suite_files
from pytest_circuitfreeze.engines import EXTRAS, EngineError, load_engine
from pytest_circuitfreeze.reports import plots
from pytest_circuitfreeze.summary import versions

COMMAND = "python -m pytest_circuitfreeze.reports.benchmarks"
FILES = tuple(path.name for path in suite_files(bench=True) if path.name.startswith("bench_"))
OF_MODELS = "bench_overhead.py"
"""Benchmarks of the models that a user chooses: they have no figures to be held to."""
ABOUT = (
    "Ratios of CPU time, on one thread: to the plain model's forward, under *install and remove* to hooks by hand, and "
    "of a screened sweep to the exact one. "
    "Stretches of calls alternate in one process, each between two of plain calls. A cell is the median with its "
    "quartiles and the number of rounds; `plain` (or `hook by hand`) beside itself is the noise floor. A hook by hand "
    "is the tightest for just that model: zeros into slices, nothing checked. nnsight, pyvene and transformer_lens are "
    "run by this plugin's adapters, whose arithmetic is part of what is measured."
)


def run(files: Sequence[str]) -> list[dict[str, Any]]:
    """Runs benchmarks, and gives what is kept of each: nothing that names the machine or its folders.

    Raises:
        RuntimeError: a benchmark failed; its output is in the message.
    """
    with TemporaryDirectory() as folder:
        into = Path(folder, "measured.json")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", folder, folder]
        command += ["--circuitfreeze", "--circuitfreeze-bench", f"--benchmark-json={into}"]
        command += [f"circuitfreeze/{name}" for name in files]
        # Within a worker of xdist pytest-benchmark would measure nothing.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if ran.returncode:
            raise RuntimeError(f"{', '.join(files)}: exit status {ran.returncode}\n{ran.stdout}{ran.stderr}")
        measured = json.loads(into.read_text(encoding="utf-8"))
    cpu = measured["machine_info"]["cpu"]
    machine = {"CPU": cpu.get("brand_raw", "unknown"), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    return [
        {"file": _file(one), "name": one["name"], "group": one["group"], "environment": _environment(machine)}
        | one["extra_info"]
        for one in measured["benchmarks"]
    ]


def _file(one: Mapping[str, Any]) -> str:
    return Path(str(one["fullname"]).partition("::")[0]).name


def _environment(machine: Mapping[str, Any]) -> dict[str, str]:
    libraries = {name: version(extra) for name, extra in EXTRAS.items() if _is_installed(name)}
    return {**{name: str(value) for name, value in machine.items()}, **versions(), **libraries}


def _is_installed(name: str) -> bool:
    try:
        load_engine(name)
    except EngineError:
        return False
    return True


def merged(old: Iterable[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """All benchmarks in the order of their files; those of a file that was run again are the new ones."""
    again = {one["file"] for one in new}
    return sorted([*(one for one in old if one["file"] not in again), *new], key=lambda one: FILES.index(one["file"]))


def render(benchmarks: Sequence[Mapping[str, Any]], notes: Mapping[str, str]) -> str:
    """The report as Markdown."""
    parts = ["# Benchmarks", f"Made by `{COMMAND} docs/benchmarks`.", ABOUT]
    environments = list(
        dict.fromkeys(", ".join(f"{k} {v}" for k, v in one["environment"].items()) for one in benchmarks)
    )
    parts.append("\n".join(f"- {each}" for each in environments))
    parts.append("![What each contender costs, by group: medians with their quartiles.](benchmarks.svg)")
    for table in tables(benchmarks):
        own = [one for one in benchmarks if one["group"] == table.group]
        parts += [f"## {table.group.capitalize()}", table.text("github")]
        parts += _told(own, notes)
    return "\n\n".join(parts) + "\n"


def _told(own: Sequence[Mapping[str, Any]], notes: Mapping[str, str]) -> list[str]:
    lines = [
        f"- {one['row']}, not reached: {notes.get(one['name'], 'not looked into')}"
        for one in own
        if verdict(one) == "not reached"
    ]
    missing = dict.fromkeys(f"- {name}, not measured: {why}" for one in own for name, why in one["missing"].items())
    lines += [" ".join(line.split()) for line in missing]
    return ["\n".join(lines)] if lines else []


def stale(benchmarks: Sequence[Mapping[str, Any]], notes: Mapping[str, str]) -> list[str]:
    """Notes about what is reached (by now), or is no benchmark."""
    return sorted(notes.keys() - {one["name"] for one in benchmarks if verdict(one) == "not reached"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs, writes, and fails if a benchmark could not run or a note is about what is reached."""
    parser = argparse.ArgumentParser(prog=COMMAND)
    parser.add_argument("folder", type=Path, help="where the report is written, beside notes.json")
    chooseable = [name for name in FILES if name != OF_MODELS]
    parser.add_argument("files", nargs="*", help=f"by default all of {', '.join(chooseable)}")
    parser.add_argument("--render", action="store_true", help="run nothing: write benchmarks.md of benchmarks.json")
    chosen = parser.parse_intermixed_args(arguments)
    unknown = [name for name in chosen.files if name not in chooseable]
    if unknown:
        parser.error(f"{', '.join(unknown)}: no such benchmarks; choose from {', '.join(chooseable)}")
    chosen.folder.mkdir(parents=True, exist_ok=True)
    path, notes_path = chosen.folder / "benchmarks.json", chosen.folder / "notes.json"
    found: list[Mapping[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    failed = 0
    for name in () if chosen.render else chosen.files or chooseable:
        try:
            found = merged(found, run([name]))
        except RuntimeError as error:
            print(error, file=sys.stderr)
            failed = 1
            continue
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(name, flush=True)
    notes = json.loads(notes_path.read_text(encoding="utf-8")) if notes_path.exists() else {}
    path.with_suffix(".md").write_text(render(found, notes), encoding="utf-8")
    path.with_suffix(".svg").write_bytes(plots.draw_benchmarks(found))
    for name in stale(found, notes):
        print(f"note about what is reached, or not measured: {name}")
    return int(bool(failed or stale(found, notes)))


if __name__ == "__main__":
    sys.exit(main())
