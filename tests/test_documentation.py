"""The documentation's examples run as they stand and print what they say; its commands name what there is."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

import pytest_circuitfreeze
from pytest_circuitfreeze.models import TINY
from pytest_circuitfreeze.options import OPTIONS

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d+\.\d+")


def blocks(page: Path, *kinds: str) -> list[tuple[str, str]]:
    """The blocks of these kinds on a page, in order."""
    return [(kind, text) for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")) if kind in kinds]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_examples_print_what_they_say(
    page: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "documented"}
    after_python = False
    for number, (kind, text) in enumerate(blocks(page, "python", "text")):
        if kind == "python":
            exec(compile(text, f"{page.name}, block {number}", "exec"), names)
        elif after_python:
            printed = capsys.readouterr().out
            assert NUMBER.sub("#", printed) == NUMBER.sub("#", text)
            # The last digit is the machine's.
            assert [float(one) for one in NUMBER.findall(printed)] == pytest.approx(
                [float(one) for one in NUMBER.findall(text)], rel=1e-2, abs=1e-3
            )
        after_python = kind == "python"
    assert capsys.readouterr().out == ""


def commands(page: Path) -> Iterator[list[str]]:
    """The commands of a page's shell blocks, in words, without what is put in front of them."""
    for _, text in blocks(page, "sh"):
        for line in text.replace("\\\n", " ").splitlines():
            for one in re.split(r" && |; ", line):
                words = [word.removeprefix(".venv/bin/") for word in shlex.split(one, comments=True)]
                while words and re.fullmatch(r"\w+=\w+", words[0]):
                    del words[0]
                if words:
                    yield words


COMMANDS = [(page, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda one: one.stem if isinstance(one, Path) else one[0])
def test_commands_name_what_there_is(page: Path, words: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    tox = ConfigParser()
    tox.read(ROOT / "tox.ini")
    flags = {option.flag: option for option in OPTIONS}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("--circuitfreeze"):
            assert word in flags
            option = flags[word]
            if option.kind != "switch":
                option.parse(following)
        if words[0] == "pip" and (extras := re.search(r"\[([\w,-]+)\]$", word)):
            assert set(extras[1].split(",")) <= project["optional-dependencies"].keys()
        if words[0] == "tox" and word == "-e":
            assert f"testenv:{following}" in tox
        if words[0].startswith("python") and word == "-m" and following != "venv":
            assert find_spec(following)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


START = ROOT / "docs" / "start.md"


@pytest.mark.parametrize("words", [words for words in commands(START) if words[0] == "pytest"], ids=" ".join)
def test_five_minutes_lead_to_a_pass(words: list[str], tmp_path: Path) -> None:
    names: dict[str, object] = {}
    for _, text in blocks(START, "python"):
        named = re.match(r"# (\w+\.py)\n", text)
        if named:
            (tmp_path / named[1]).write_text(text, encoding="utf-8")
            exec(compile(text, named[1], "exec"), names)
    names["build"]().save_pretrained(tmp_path / "checkpoint")
    chosen = words.index("-k") if "-k" in words else None
    narrower = f"{words[chosen + 1]} and generators" if chosen else "generators"
    # In a process of its own: here the folder of the reader's file would be on the path already.
    command = [sys.executable, "-P", "-m", *words, "-k", narrower, "-W", "error"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 claim on 1 model: 1 passed" in result.stdout


def test_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == pytest_circuitfreeze.__version__
    assert cited["authors"] == [{"name": "pytest-circuitfreeze contributors"}]
    required = {"cff-version", "message", "title", "authors", "license", "type"}
    assert required <= cited.keys()


def _job(path: str) -> Any:
    """The only job of a workflow."""
    (job,) = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))["jobs"].values()
    return job


def test_workflows_and_hook_run_what_there_is() -> None:
    job, weekly = _job("docs/circuitfreeze-workflow.yml"), _job("docs/versions-workflow.yml")
    assert set(job["strategy"]["matrix"]["architecture"]) <= TINY.keys()
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    lines = [step["run"] for one in (job, weekly) for step in one["steps"] if "run" in step]
    assert any("pytest_circuitfreeze.reports compare" in line for line in lines)
    lines.append(" ".join([hook["entry"], *hook["args"]]))
    flags = {option.flag for option in OPTIONS}
    named = [word for line in lines for word in line.split() if word.startswith("--circuitfreeze")]
    assert len(named) > 3
    assert flags >= set(named)


def test_weekly_workflow_runs_environments_of_tox() -> None:
    tox = ConfigParser()
    tox.read(ROOT / "tox.ini")
    environments = {
        one["environment"] for one in _job(".github/workflows/versions.yml")["strategy"]["matrix"]["include"]
    }
    assert {f"testenv:{name}" for name in environments} <= {*tox}
    assert {"oldest", "newest"} <= environments
