"""The documentation's examples run as they stand and print what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d+\.\d+")


@pytest.mark.parametrize("page", sorted(page.name for page in FOLDER.glob("*.md")))
def test_examples_print_what_they_say(page, capsys):
    blocks = BLOCK.findall((FOLDER / page).read_text(encoding="utf-8"))
    assert blocks
    names: dict[str, object] = {}
    for number, (kind, text) in enumerate(blocks):
        if kind == "python":
            exec(compile(text, f"{page}, block {number}", "exec"), names)
        else:
            printed = capsys.readouterr().out
            assert NUMBER.sub("#", printed) == NUMBER.sub("#", text)
            # The last digit is the machine's.
            assert [float(one) for one in NUMBER.findall(printed)] == pytest.approx(
                [float(one) for one in NUMBER.findall(text)], rel=1e-2, abs=1e-3
            )
    assert capsys.readouterr().out == ""
