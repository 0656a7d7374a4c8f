"""What changed for each architecture from one release of transformers to another: two compatibility matrices compared.

    python -m pytest_circuitfreeze.reports.compatibility_changes docs/compatibility 5.23 5.24

writes `changes-5.23-5.24.md` beside the two matrices, and fails if an architecture that was supported is not any more.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COMMAND = "python -m pytest_circuitfreeze.reports.compatibility_changes"
SUPPORTED = ("pass", "pass*")
VERDICTS = {
    "pass": "passes every claim",
    "pass*": "passes every claim, except for configs that are refused by name",
    "refused": "is refused",
    "not built": "has no tiny model",
    "FAIL": "fails",
}
GROUPS = {
    "broken": "No longer supported",
    "mended": "Newly supported",
    "other": "Changed in another way",
    "new": "New types",
    "gone": "Types that are gone",
    "claims": "Claims with another outcome",
}


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, list[str]]:
    """The lines of each group of `GROUPS`, from two matrices as `compatibility.document` gives them."""
    old, new = before["architectures"], after["architectures"]
    groups: dict[str, list[str]] = {group: [] for group in GROUPS}
    groups["new"] = [f"**{name}** {_verdict(new[name])}" for name in sorted(new.keys() - old.keys())]
    groups["gone"] = [f"**{name}**, which {_verdict(old[name])}" for name in sorted(old.keys() - new.keys())]
    for name in sorted(old.keys() & new.keys()):
        before_verdict, after_verdict = old[name]["verdict"], new[name]["verdict"]
        if before_verdict != after_verdict:
            group = _group(before_verdict in SUPPORTED, after_verdict in SUPPORTED)
            groups[group].append(f"**{name}** {_verdict(new[name])}; before it {_verdict(old[name])}")
        elif outcomes := _claims(old[name]["claims"], new[name]["claims"]):
            groups["claims"].append(f"**{name}**: {'; '.join(outcomes)}")
    return groups


def _group(was_supported: bool, is_supported: bool) -> str:
    if was_supported == is_supported:
        return "other"
    return "mended" if is_supported else "broken"


def _verdict(entry: Mapping[str, Any]) -> str:
    words = VERDICTS[entry["verdict"]]
    reasons = [] if entry["verdict"] == "pass" else entry["reasons"]
    return f"{words} ({reasons[0]})" if reasons else words


def _claims(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """The claims of both matrices with another outcome. A claim that only one of them has is not compared."""
    return [
        f"{claim.replace('_', ' ')}: {before[claim]}, now {after[claim]}"
        for claim in before
        if claim in after and before[claim] != after[claim]
    ]


def render(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The comparison as Markdown."""
    first, second = (matrix["environment"]["transformers"] for matrix in (before, after))
    groups = changes(before, after)
    lines = [
        f"# What changed from transformers {first} to {second}",
        "",
        f"Made by `{COMMAND}` from the two compatibility matrices.",
        "",
        "| matrix | transformers | torch | claims | types | supported | refused | without a model | failed |",
        "| --- | --- | --- | --: | --: | --: | --: | --: | --: |",
        *(_counts(name, matrix) for name, matrix in (("before", before), ("after", after))),
    ]
    for group, title in GROUPS.items():
        lines += ["", f"## {title}", "", *([f"- {line}" for line in map(_plain, groups[group])] or ["None."])]
    return "\n".join(lines) + "\n"


def _counts(name: str, matrix: Mapping[str, Any]) -> str:
    types = [entry["verdict"] for entry in matrix["architectures"].values() if entry["type"]]
    environment = matrix["environment"]
    cells: list[object] = [name, environment["transformers"], environment["torch"], len(matrix["claims"]), len(types)]
    cells.append(sum(verdict in SUPPORTED for verdict in types))
    cells += [types.count(verdict) for verdict in ("refused", "not built", "FAIL")]
    return f"| {' | '.join(map(str, cells))} |"


def _plain(line: str) -> str:
    return " ".join(line.replace("_", r"\_").split())


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the comparison; 1 if an architecture is no longer supported."""
    parser = argparse.ArgumentParser(prog=COMMAND)
    parser.add_argument("folder", type=Path, help="where the matrices are, and the comparison is written")
    parser.add_argument("before", help="the earlier release of transformers, such as 5.23")
    parser.add_argument("after", help="the later one")
    chosen = parser.parse_args(arguments)
    before, after = (
        json.loads((chosen.folder / f"compatibility-transformers-{release}.json").read_text(encoding="utf-8"))
        for release in (chosen.before, chosen.after)
    )
    path = chosen.folder / f"changes-{chosen.before}-{chosen.after}.md"
    path.write_text(render(before, after), encoding="utf-8")
    print(path)
    return int(bool(changes(before, after)["broken"]))


if __name__ == "__main__":
    sys.exit(main())
