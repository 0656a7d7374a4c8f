"""The compatibility matrix: every tiny architecture by every claim, run in chunks and merged into one document.

    python -m pytest_circuitfreeze.reports.compatibility docs/compatibility [architecture ...]

runs the shipped suites on all architectures, each chunk in a process of its own with a time limit, and writes
`compatibility-transformers-<version>.json` and `.md`.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pytest_circuitfreeze import matrix
from pytest_circuitfreeze.architectures import every_architecture, model_types
from pytest_circuitfreeze.reports.document import Report, ReportError, read
from pytest_circuitfreeze.results import Result
from pytest_circuitfreeze.summary import versions

CHUNK = 8
SECONDS = 240
"""Time limit for each architecture of a chunk."""

SHORT = {"pass": "✓", "pass*": "✓*", "refused": "✗"}
LEGEND = (
    "✓ passes; ✓* passes, but for configs that are refused by name; n/a says nothing about this architecture; "
    "✗ is refused. Reasons are below."
)
COMMAND = "python -m pytest_circuitfreeze.reports.compatibility"
GROUPS = {
    "pass": "pass every claim",
    "pass*": "pass every claim, but for single configs that are refused by name",
    "refused": "are refused as a whole",
    "not built": "have no tiny model here",
    "FAIL": "fail",
}


def run_suites(options: Sequence[str], seconds: float, keep: Path | None = None) -> Report | None:
    """Runs the shipped suites alone, with these options, in a process of its own.

    Args:
        keep: the file that the run's `report.json` is copied to.

    Returns:
        its report; `None` where it did not end in time or died.
    """
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", folder]
        command += ["--circuitfreeze", *options, "--circuitfreeze-report", f"{folder}/report", folder]
        try:
            subprocess.run(command, cwd=folder, timeout=seconds, capture_output=True, check=False)
            written = Path(folder, "report", "report.json")
            report = read(written)
            if keep is not None:
                shutil.copyfile(written, keep)
            return report
        except (subprocess.TimeoutExpired, ReportError, OSError):
            return None


def run(names: Sequence[str], profile: str, *, seconds: float = SECONDS) -> dict[str, list[Result] | None]:
    """Runs the suites on `names` in one process.

    Returns:
        the results of each; `None` for each where the process did not end in time or died.
    """
    options = ["--circuitfreeze-arch", ",".join(names), "--circuitfreeze-profile", profile]
    report = run_suites(options, seconds * len(names))
    if report is None:
        return dict.fromkeys(names)
    return {name: [result for result in report.results if result.model == name] for name in names}


def run_all(names: Sequence[str], profile: str, chunk: int) -> Iterator[dict[str, list[Result] | None]]:
    """Runs all in chunks, and gives the results of each; where one does not end, each of its architectures alone."""
    for start in range(0, len(names), chunk):
        part = names[start : start + chunk]
        begun = time.perf_counter()
        results = run(part, profile)
        if None in results.values() and len(part) > 1:
            results = {name: run([name], profile)[name] for name in part}
        shown = ", ".join(f"{name} {verdict(results[name])}" for name in part)
        print(f"{start + len(part)}/{len(names)} {time.perf_counter() - begun:5.0f} s  {shown}", flush=True)
        yield results


def verdict(results: Iterable[Result] | None) -> str:
    """One of `GROUPS` for one architecture."""
    if results is None:
        return "FAIL"
    own = list(results)
    cells = {matrix.cell(own, name) for name in {result.model for result in own} if name}
    cells |= {matrix.cell([result], str(result.model)) for result in own}
    if own and all(_unbuilt(result) for result in own):
        return "not built"
    if cells & {"FAIL", "ERROR", "skip"} or not own:
        return "FAIL"
    if "refused" in cells:
        return "refused"
    return "pass*" if "pass*" in cells else "pass"


def _unbuilt(result: Result) -> bool:
    told = result.message.removeprefix("Failed: ")  # pytest's own word before a reason to fail
    return result.outcome in ("error", "n/a") and told.startswith("a tiny model of type")


def document(found: Mapping[str, Sequence[Result] | None], profile: str) -> dict[str, Any]:
    """What the matrix holds, as plain data: `seconds` are wall time, `reasons` say what is refused or silent."""
    claims: dict[str, str] = {}
    for results in found.values():
        claims |= {result.claim: result.sentence for result in results or ()}
    return {
        "environment": versions(),
        "profile": profile,
        "claims": claims,
        "architectures": {name: _entry(name, results) for name, results in found.items()},
    }


def _entry(name: str, results: Sequence[Result] | None) -> dict[str, Any]:
    own = list(results or ())
    result = verdict(results)
    reasons = [line.removeprefix(f"{name} ") for line in matrix.reasons(own)]
    if result == "not built":
        reasons = sorted({one.message.removeprefix("Failed: ") for one in own})
    elif result == "FAIL":
        broken = [one for one in own if one.outcome in ("failed", "error", "skipped")]
        about = {message: [one.claim for one in broken if one.message == message] for message in _messages(broken)}
        reasons += [f"{', '.join(claims)}: {message}" for message, claims in about.items()]
        reasons += [] if own else ["the run did not end in time, or died"]
    return {
        "type": name in model_types(),
        "verdict": result,
        "seconds": round(sum(one.seconds for one in own), 1),
        "examples": sum(one.examples for one in own),
        "claims": {} if result == "not built" else {one.claim: matrix.cell([one], name) for one in own},
        "reasons": reasons,
    }


def _messages(results: Iterable[Result]) -> list[str]:
    return list(dict.fromkeys(result.message for result in results))


def render(matrix_of: Mapping[str, Any]) -> str:
    """The document as Markdown."""
    entries: Mapping[str, Any] = matrix_of["architectures"]
    claims: Mapping[str, str] = matrix_of["claims"]
    found = matrix_of["environment"]
    examples, seconds, types = (sum(one[what] for one in entries.values()) for what in ("examples", "seconds", "type"))
    lines = [
        f"# What freeze_core serves: transformers {found['transformers']}, torch {found['torch']}",
        "",
        f"Made by `{COMMAND} docs/compatibility`.",
        f"Profile {matrix_of['profile']}, {examples:,} examples, {seconds / 60:.0f} minutes of tests.",
        f"{types} causal language model types of transformers, and {len(entries) - types} built-in variants of some.",
        "",
        *(f"- {_counted(entries.values(), group)} {words}" for group, words in GROUPS.items()),
        "",
        LEGEND,
        "",
        "## Claims",
        "",
        *(f"{number}. {sentence}" for number, sentence in enumerate(claims.values(), 1)),
        "",
        "## Architectures",
        "",
        "| architecture | " + " | ".join(str(number) for number in range(1, len(claims) + 1)) + " | seconds |",
        "| --- |" + " :-: |" * len(claims) + " --: |",
    ]
    for name, one in entries.items():
        cells = [SHORT.get(cell := one["claims"].get(claim, ""), cell) for claim in claims]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {one['seconds']:.0f} |")
    for group, words in GROUPS.items():
        told = {name: one["reasons"] for name, one in entries.items() if one["verdict"] == group and one["reasons"]}
        if told and group != "pass":
            lines += ["", f"## Those that {words}", ""]
            lines += [f"- **{name}**: {'; '.join(_once(map(_plain, reasons)))}" for name, reasons in told.items()]
    return "\n".join(lines) + "\n"


def _counted(entries: Iterable[Mapping[str, Any]], group: str) -> str:
    """How many architectures are in a group, and how many of them are types of transformers themselves."""
    own = [entry for entry in entries if entry["verdict"] == group]
    return f"{len(own)} architectures ({sum(entry['type'] for entry in own)} types)"


def _once(reasons: Iterable[str]) -> list[str]:
    """Reasons that differ in their numbers alone, as those of several layers do, are told once."""
    return list({re.sub(r"\d+", "", reason): reason for reason in reversed(list(reasons))}.values())[::-1]


def _plain(reason: str) -> str:
    return " ".join(reason.replace("_", r"\_").replace("*", r"\*").split())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs, writes, and fails if an architecture did. Those that are named replace theirs in a matrix that is there."""
    parser = argparse.ArgumentParser(prog=COMMAND)
    parser.add_argument("folder", type=Path, help="where the matrix is written")
    parser.add_argument("names", nargs="*", help="architectures, by default all")
    parser.add_argument("--profile", default="quick", help="how many examples each claim gets")
    parser.add_argument("--chunk", type=int, default=CHUNK, help="architectures a process")
    chosen = parser.parse_intermixed_args(arguments)  # names may stand behind options
    names = chosen.names or every_architecture()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    found = versions()["transformers"].split(".")
    path = chosen.folder / f"compatibility-transformers-{'.'.join(found[:2])}.json"
    before = json.loads(path.read_text(encoding="utf-8"))["architectures"] if chosen.names and path.exists() else {}
    made: dict[str, Any] = {}
    results: dict[str, list[Result] | None] = {}
    for part in run_all(names, chosen.profile, chosen.chunk):
        results |= part
        made = document(results, chosen.profile)
        made["architectures"] = before | made["architectures"]
        # After each chunk, so that a run that is stopped has not been for nothing.
        path.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(render(made), encoding="utf-8")
    return int(any(one["verdict"] == "FAIL" for one in made["architectures"].values()))


if __name__ == "__main__":
    sys.exit(main())
