"""What is kept of many seeds is of this catalogue, and nothing in it got past its claim."""

from __future__ import annotations

from pathlib import Path

from broken_engines import BROKEN
from many_seeds import SEEDS, markdown, missing_blocks, missing_pairs, read, refused

from pytest_circuitfreeze.engines import FreezeCore

KEPT = Path(__file__).parent.parent.parent / "docs" / "claims"


def test_every_broken_engine_was_refused_on_every_seed() -> None:
    lines = read(KEPT / "seeds.jsonl")
    assert missing_pairs(lines) == [], "run `tox -e seeds`, which runs what is new"
    assert [line for line in lines if "ends" in line and len(refused(line)) < SEEDS] == []


def test_no_honest_engine_was_refused() -> None:
    assert [line for line in read(KEPT / "seeds.jsonl") if line.get("alarms")] == []


def test_the_page_is_made_of_what_is_kept() -> None:
    assert (KEPT / "seeds.md").read_text(encoding="utf-8") == markdown(read(KEPT / "seeds.jsonl"))


def test_what_is_new_or_gone_is_noticed() -> None:
    claim, several = next(iter(BROKEN.items()))
    first = {"claim": claim, "engine": several[0].__name__, "ends": [1] * SEEDS}
    assert (claim, several[0]) not in missing_pairs([first])
    assert (claim, several[0]) in missing_pairs([{**first, "engine": "Gone"}])
    accepted = {"claim": claim, "engine": "freeze_core", "from": SEEDS, "alarms": []}
    assert (FreezeCore, claim, SEEDS) not in missing_blocks([accepted])
    assert (FreezeCore, claim, 0) in missing_blocks([accepted])
