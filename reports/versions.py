"""The version matrix: the main job in one environment after another, whose reports are kept.

    python -m pytest_circuitfreeze.reports.versions docs/versions [architecture ...]

runs the shipped suites in the environment that it is run in, says what changed against the report that was kept last,
keeps the new report as `python-<version>-torch-<version>-transformers-<version>.json`, and writes `versions.md` of all
reports in the folder. An environment of the same three versions replaces its report.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from tabulate import tabulate

from freeze_core.versions import release_numbers
from pytest_circuitfreeze import matrix
from pytest_circuitfreeze.reports.compare import compare
from pytest_circuitfreeze.reports.compare import render as render_comparison
from pytest_circuitfreeze.reports.compatibility import run_suites
from pytest_circuitfreeze.reports.document import Report, read
from pytest_circuitfreeze.reports.markdown import escape
from pytest_circuitfreeze.results import WITHOUT_MODEL
from pytest_circuitfreeze.summary import versions

COMMAND = "python -m pytest_circuitfreeze.reports.versions"
AXES = ("python", "torch", "transformers")
"""The versions that tell environments apart."""
OTHERS = ("pytest", "hypothesis", "numpy")
SECONDS = 7200
"""Time limit of a run."""
ABOUT = (
    "Each line is one environment, in which every claim was tried on each architecture, as `pytest --circuitfreeze "
    "circuitfreeze` does. A cell counts claims. Those that did not pass are listed below, with the reason."
)


def environment() -> dict[str, str]:
    """The versions of this environment that name its report."""
    return {"python": ".".join(map(str, sys.version_info[:3])), **versions()}


def file_name(environment: Mapping[str, str]) -> str:
    """The file that keeps the report of an environment.

    A release of Python has patches, and one of torch has builds, which share a file.
    """
    python, torch, transformers = (environment[axis].partition("+")[0] for axis in AXES)
    minor = ".".join(python.split(".")[:2])
    return f"python-{minor}-torch-{torch}-transformers-{transformers}.json"


def read_all(folder: Path) -> dict[str, Report]:
    """The kept reports by file name, the newest versions last.

    Raises:
        ReportError: a JSON file in the folder is not a report.
    """
    reports = {path.name: read(path) for path in folder.glob("*.json")}
    return dict(sorted(reports.items(), key=lambda item: _age(item[1])))


def _age(report: Report) -> list[tuple[int, ...]]:
    return [release_numbers(report.environment[axis]) for axis in reversed(AXES)]


def render(reports: Sequence[Report]) -> str:
    """The matrix as Markdown."""
    models = list(
        dict.fromkeys(model for report in reports for model in matrix.columns(report.results, report.targets))
    )
    rows = [
        [
            f"{report.ended.started:%Y-%m-%d}",
            *(report.environment[name] for name in (*AXES, *OTHERS)),
            report.environment["platform"].partition("-")[0],
            report.settings["profile"],
            *(_counts(report, model) for model in models),
        ]
        for report in reports
    ]
    heads = ["date", *AXES, *OTHERS, "system", "profile", *map(escape, models)]
    parts = [
        "# Versions that were run",
        f"Made by `{COMMAND} docs/versions`, one environment at a time.",
        ABOUT,
        tabulate(rows, heads, tablefmt="github", disable_numparse=True),
    ]
    for report in reports:
        lines = _not_passed(report)
        if lines:
            title = ", ".join(f"{axis} {report.environment[axis]}" for axis in AXES)
            parts += [f"## Did not pass: {title}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _counts(report: Report, model: str) -> str:
    """How many claims on a model came out how, the worst first."""
    cells = Counter(row.cells[0] for row in matrix.rows(report.results, [model]))
    del cells[matrix.NOT_RUN]
    words = [*matrix.WORDS.values(), matrix.PARTLY, matrix.IN_PART]
    return ", ".join(f"{cells[word]} {word}" for word in words if cells[word]) or matrix.NOT_RUN


def _not_passed(report: Report) -> list[str]:
    """A line for each claim that did not pass in full on some models, and why."""
    models: dict[tuple[str, str, str], list[str]] = {}
    for result in report.results:
        model = result.model or WITHOUT_MODEL
        word = matrix.cell([result], model)
        if word != matrix.WORDS["passed"]:
            reason = "; ".join([*filter(None, [result.message]), *result.refusals, *result.not_offered])
            models.setdefault((word, result.claim, reason), []).append(model)
    return [
        f"- {word}, **{matrix.words(claim)}** ({', '.join(map(escape, names))}): {escape(reason)}"
        for (word, claim, reason), names in models.items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs, compares, keeps, and fails if a claim did."""
    parser = argparse.ArgumentParser(prog=COMMAND)
    parser.add_argument("folder", type=Path, help="where the reports are kept")
    parser.add_argument("names", nargs="*", help="architectures, by default those of the main job")
    parser.add_argument("--profile", default="standard", help="how many examples each claim gets")
    parser.add_argument("--render", action="store_true", help="run nothing: write versions.md of the kept reports")
    chosen = parser.parse_intermixed_args(arguments)  # names may stand behind options
    chosen.folder.mkdir(parents=True, exist_ok=True)
    reports = read_all(chosen.folder)
    failed = False
    if not chosen.render:
        options = ["--circuitfreeze-profile", chosen.profile]
        options += ["--circuitfreeze-arch", ",".join(chosen.names)] if chosen.names else []
        name = file_name(environment())
        path = chosen.folder / name
        report = run_suites(options, SECONDS, path)
        if report is None:
            print(f"{name}: the run did not end within {SECONDS} s, or died; no report was kept", file=sys.stderr)
            return 1
        print(f"{path}\n{matrix.totals(report.results)}\n")
        if reports:
            before = name if name in reports else list(reports)[-1]
            differences = render_comparison(compare(reports[before], report))
            print(f"# Compared with {before}\n\n{differences or 'nothing differs beyond the noise'}")
        reports = read_all(chosen.folder)
        failed = bool(report.failed)
    (chosen.folder / "versions.md").write_text(render(list(reports.values())), encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
