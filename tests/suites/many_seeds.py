"""Runs broken engines on 20 seeds, each on the claims whose business it is, and honest ones on all: `tox -e seeds`.

The product has to be accepted by every claim on 200 seeds. The engine that the broken ones are made of is their
control: it has to be accepted on the same 20.

    python tests/suites/many_seeds.py docs/claims

What has come of each is a line of `seeds.jsonl`, written when it is known: a run that was stopped goes on where it was,
and one after the catalogue was changed runs what is new. After a change to a check, take its lines out. `seeds.md` is
made of that file. The status is 1 where a broken engine got past or an honest one did not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from broken_engines import BROKEN, architectures_of
from honest_engine import HookEngine
from verdicts import PROPERTIES, verdict

from pytest_circuitfreeze.engines import Engine, FreezeCore
from pytest_circuitfreeze.models import tiny_model

SEEDS = 20
HONEST: Mapping[Callable[[], Engine], int] = {FreezeCore: 200, HookEngine: SEEDS}
"""Honest engines, and the number of their seeds."""
ARCHITECTURES = ("gpt2", "llama", "mistral_gqa", "falcon_mqa")
"""What the seeds of honest engines take in turn."""

Line = dict[str, Any]


def missing_pairs(known: Sequence[Line]) -> list[tuple[str, type[HookEngine]]]:
    """The claims and broken engines that have no line yet."""
    done = {(line.get("claim"), line["engine"]) for line in known}
    pairs = [(claim, broken) for claim, several in BROKEN.items() for broken in several]
    return [(claim, broken) for claim, broken in pairs if (claim, broken.__name__) not in done]


def missing_blocks(known: Sequence[Line]) -> list[tuple[Callable[[], Engine], str, int]]:
    """Honest engines, claims and the first of 20 seeds, where there is no line yet: the first seeds of all first."""
    done = {(line["engine"], line["claim"], line["from"]) for line in known if "from" in line}
    return [
        (make, claim, start)
        for start in range(0, max(HONEST.values()), SEEDS)
        for make, seeds in HONEST.items()
        for claim in PROPERTIES
        if start < seeds and (make().name, claim, start) not in done
    ]


def missing(known: Sequence[Line]) -> Iterator[Callable[[], Line]]:
    """What makes the lines that are not `known` yet, those of broken engines first."""
    for claim, broken in missing_pairs(known):
        yield partial(of_broken, claim, broken)
    for make, claim, start in missing_blocks(known):
        yield partial(of_honest, make, claim, start)


def of_broken(claim: str, broken: type[HookEngine]) -> Line:
    """Under each seed, the number of examples until the refusal, or how it ended otherwise."""
    architectures = architectures_of(broken)
    ends: list[int | str] = []
    for seed in range(SEEDS):
        try:
            ended = verdict(claim, broken(), tiny_model(architectures[seed % len(architectures)]), seed)
            ends.append(ended.examples if ended.broken else "accepted")
        except Exception as error:  # the flaw breaks something before the check sees it
            ends.append(f"{type(error).__name__}: {error}")
    return {"claim": claim, "engine": broken.__name__, "on": list(architectures), "ends": ends}


def of_honest(make: Callable[[], Engine], claim: str, start: int) -> Line:
    """Under 20 seeds, what the claim found against the engine."""
    alarms = []
    for seed in range(start, start + SEEDS):
        architecture = ARCHITECTURES[seed % len(ARCHITECTURES)]
        try:
            broken = verdict(claim, make(), tiny_model(architecture), seed).broken
            alarms += [f"seed {seed}, {architecture}: {broken.headline}"] if broken else []
        except Exception as error:  # as false as a refusal
            alarms.append(f"seed {seed}, {architecture}: {type(error).__name__}: {error}")
    return {"claim": claim, "engine": make().name, "from": start, "alarms": alarms}


def read(path: Path) -> list[Line]:
    """The lines that are kept, of what the catalogue still holds."""
    if not path.exists():
        return []
    return in_order([json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()])


def in_order(lines: Sequence[Line]) -> list[Line]:
    """Lines of broken engines in the order of the catalogue, those that it has no more left out, then the others."""
    order = [(claim, broken.__name__) for claim, several in BROKEN.items() for broken in several]
    broken = [line for line in lines if (line["claim"], line["engine"]) in order]
    honest = [line for line in lines if "from" in line and line["claim"] in PROPERTIES]
    return [
        *sorted(broken, key=lambda line: order.index((line["claim"], line["engine"]))),
        *sorted(honest, key=lambda line: (line["engine"], line["from"], line["claim"])),
    ]


def refused(line: Line) -> list[int]:
    """After how many examples a broken engine was refused, under each seed that did so."""
    return [end for end in line["ends"] if isinstance(end, int)]


def markdown(lines: Sequence[Line]) -> str:
    """The page that is made of the lines."""
    broken = [line for line in lines if "ends" in line]
    text = [
        "# Broken engines by claim, and honest ones",
        "",
        "Made by `tox -e seeds` from `seeds.jsonl`: shipped properties, run in process under the standard profile.",
        "Each engine is broken on purpose, in one way, and runs on the claim whose business that is; seeds take the",
        "architectures in turn.",
        "",
        _of_broken_engines(broken),
        *(_of_honest_engine(make().name, seeds, lines) for make, seeds in HONEST.items()),
        "",
        "| claim | broken engine | its flaw | on | refused | examples until then: median, most |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    classes = {one.__name__: one for several in BROKEN.values() for one in several}
    for line in broken:
        flaw = (classes[line["engine"]].__doc__ or "").partition("\n")[0]
        found = refused(line)
        counts = f"{median(found):g}, {max(found)}" if found else "-"
        cells = (line["claim"], line["engine"], flaw, ", ".join(line["on"]), f"{len(found)} of {SEEDS}", counts)
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join([*text, ""])


def _of_broken_engines(broken: Sequence[Line]) -> str:
    engines = {line["engine"] for line in broken}
    always = sum(len(refused(line)) == SEEDS for line in broken)
    return (
        f"- {len(engines)} broken engines, {len(broken)} pairs of engine and claim: {always} refused on each of "
        f"{SEEDS} seeds"
    )


def _of_honest_engine(name: str, seeds: int, lines: Sequence[Line]) -> str:
    tried = dict.fromkeys(PROPERTIES, 0)
    alarms = 0
    for line in lines:
        if "from" in line and line["engine"] == name:
            tried[line["claim"]] += SEEDS
            alarms += len(line["alarms"])
    whole = sum(count == seeds for count in tried.values())
    left = ", ".join(f"`{claim}` on {count}" for claim, count in tried.items() if count < seeds)
    return (
        f"- the honest engine `{name}`: {whole} of {len(tried)} claims were tried on {seeds} seeds, "
        f"{', '.join(ARCHITECTURES)} in turn{f' ({left})' if left else ''}; {alarms} false alarms"
    )


def keep(folder: Path, lines: Sequence[Line]) -> None:
    """Writes both files."""
    (folder / "seeds.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    (folder / "seeds.md").write_text(markdown(lines), encoding="utf-8")


def main(folder: Path) -> int:
    """Runs what is missing, and keeps each line when it is there."""
    lines = read(folder / "seeds.jsonl")
    keep(folder, lines)
    for make in missing(lines):
        line = make()
        print(json.dumps(line), flush=True)
        lines = in_order([*lines, line])
        keep(folder, lines)
    wrong = [line for line in lines if line.get("alarms") or ("ends" in line and len(refused(line)) < SEEDS)]
    print(f"{len(lines)} lines, {len(wrong)} of them wrong", *map(json.dumps, wrong), sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
