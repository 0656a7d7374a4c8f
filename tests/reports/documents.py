"""Documents of runs that never were, for tests of what is made of them."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pytest_circuitfreeze import reports
from pytest_circuitfreeze.results import Result
from pytest_circuitfreeze.settings import Settings

EVIL = 'a"b<script>alert(1)</script>&amp;</td>|`x`_$y_1$\\input{z}%#{~^}![i](http://x.invalid/y)\u202e'
"""A name that means something to HTML, Markdown and LaTeX, and writes from right to left."""

SETTINGS = Settings(
    enabled=True,
    architectures=("gpt2", "llama"),
    models=(EVIL,),
    engine="freeze_core",
    profile="standard",
    seed=7,
    device="cpu",
    dtype=None,
    attn=None,
    bench=True,
    report=Path("secret/folder"),
)
ENDED = reports.Ended(1, True, datetime(2020, 1, 2, 3, 4, tzinfo=UTC), 61.04)
VERSIONS = {"torch": "2.13.0", "transformers": "5.1"}
HOLDS = Result(
    id="circuitfreeze/test_values.py::test_values_agree[gpt2]",
    claim="values_agree",
    sentence="Frozen values are r * strength.",
    model="gpt2",
    engine="freeze_core",
    outcome="passed",
    seconds=0.5,
    examples=25,
    error=1e-9,
    bound=4e-9,
    message="",
)
EXACT = replace(HOLDS, id=HOLDS.id.replace("gpt2", "llama"), model="llama", error=0.0, bound=0.0)
BREAKS = replace(
    HOLDS,
    id=f"circuitfreeze/test_values.py::test_values_agree[{EVIL}]",
    model=EVIL,
    outcome="failed",
    examples=3,
    message=f"v of {EVIL} differs by 1",
    failure={
        "claim": "v stays",
        "found": f"{EVIL} found",
        "place": {"layer": 1, "head": 2},
        "error": "inf",
        "bound": 0.0,
        "arguments": {"config": f"C({EVIL})"},
        "snippet": "x = '```'\ncheck_v(x)\n",
    },
)


def benchmark(
    row: str, median: float, *, floor: float = 1.0, width: float = 0.02, target: float | None = 1.05
) -> Result:
    """One that was measured."""
    ratios = {
        name: {"median": value, "low": value - width / 2, "high": value + width / 2, "n": 30}
        for name, value in (("plain", floor), ("freeze_core", median))
    }
    facts = {"group": "frozen forward", "row": row, "engine": "freeze_core", "ratios": ratios, "target": target}
    return replace(
        HOLDS,
        id=f"circuitfreeze/bench_overhead.py::bench_frozen_forward[{row}]",
        claim="frozen_forward",
        sentence="A frozen forward.",
        examples=0,
        error=0.0,
        bound=0.0,
        benchmark={**facts, "missing": {}},
    )


ALL = (HOLDS, EXACT, BREAKS, benchmark("gpt2, one head", 1.04), benchmark(EVIL, 1.2))


def document(results: tuple[Result, ...] = ALL, **changed: Any) -> dict[str, Any]:
    """The document of a run that had these results, as it is after it was written and read."""
    built = reports.build(replace(SETTINGS, **changed), VERSIONS, results, ENDED)
    found: dict[str, Any] = json.loads(json.dumps(built))
    return found
