"""What GitHub shows of a run: annotations of what failed, and the report as the summary of the job.

Documented under "Workflow commands for GitHub Actions". Both are found out by the variables that such a job has.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from pytest_circuitfreeze.results import Result

LARGEST = 1024 * 1024
"""Bytes of a summary that GitHub takes; it drops all of a larger one."""
CUT = b"\n\nCut here: this is as much as a summary may hold. The report itself has all.\n"
MOST = 10
"""Annotations of one kind that GitHub shows of a step."""


def workflow_commands(results: Iterable[Result], environment: Mapping[str, str] = os.environ) -> list[str]:
    """A workflow command for each test that failed, in a job; none elsewhere."""
    if environment.get("GITHUB_ACTIONS") != "true":
        return []
    failed = [result for result in results if result.outcome in ("failed", "error")]
    return [
        f"::error title={_escaped(result.id, ':,')}::{_escaped(result.message or result.sentence)}"
        for result in failed[:MOST]
    ]


def summary_is_wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether there is a job whose summary the report may be added to."""
    return bool(environment.get("GITHUB_STEP_SUMMARY"))


def add_summary(text: str, environment: Mapping[str, str] = os.environ) -> None:
    """Adds Markdown to the job's summary, if there is one, cut where GitHub would drop all of it.

    Raises:
        OSError: the file that the variable names cannot be written.
    """
    if not summary_is_wanted(environment):
        return
    path = Path(environment["GITHUB_STEP_SUMMARY"])
    with path.open("ab") as file:
        room = LARGEST - file.tell()
        content = text.encode(errors="backslashreplace")
        if len(content) > room:
            kept = content[: max(0, room - len(CUT))].decode(errors="ignore").encode()
            content = kept + CUT if kept else b""
        file.write(content)


def _escaped(text: str, more: str = "") -> str:
    """A value of a workflow command, which ends at its line's end."""
    for character in "%\r\n" + more:
        text = text.replace(character, f"%{ord(character):02X}")
    return text
