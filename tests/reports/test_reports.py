"""The report's files: what they say, that they are whole, and what is refused as one."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import documents
import pytest
from documents import ENDED, HOLDS

from pytest_circuitfreeze import reports
from pytest_circuitfreeze.reports import ReportError, files

SETTINGS = replace(documents.SETTINGS, architectures=("gpt2", "falcon_mqa"), models=("my|model",), bench=False)
BREAKS = replace(
    HOLDS,
    id="circuitfreeze/test_values.py::test_values_agree[my|model]",
    model="my|model",
    outcome="failed",
    examples=3,
    message="v differs by 1 | at <token> 0",
)
MARKDOWN = r"""# circuitfreeze: freeze\_core

1 claim on 2 models: 1 failed, 1 passed; 28 examples

closest to its bound: values agree, gpt2, 25% of it

## Values

| claim                            | gpt2   | my\|model   | of bound   |
|----------------------------------|--------|-------------|------------|
| Frozen values are r \* strength. | pass   | FAIL        | 25%        |

## What failed

- circuitfreeze/test\_values.py::test\_values\_agree\[my\|model\]: v differs by 1 \| at \<token> 0

## What was run

| setting       | value             |
|---------------|-------------------|
| architectures | gpt2, falcon\_mqa |
| models        | my\|model         |
| engine        | freeze\_core      |
| profile       | standard          |
| seed          | 7                 |
| device        | cpu               |
| dtype         | default           |
| attn          | default           |
| bench         | False             |
| accepted      | none              |
| bench\_limit  | default           |
"""


@pytest.fixture
def document() -> dict[str, object]:
    return reports.build(SETTINGS, {"torch": "2.13.0"}, [HOLDS, BREAKS], ENDED)


def written(document: Mapping[str, object], folder: Path) -> dict[str, Path]:
    return {path.name: path for path in reports.write(document, folder)}


def test_markdown_says_it_all(document: dict[str, object], tmp_path: Path) -> None:
    shown = written(document, tmp_path)["report.md"]
    text = shown.read_text(encoding="utf-8")
    assert text.startswith(MARKDOWN)
    assert [line.split() for line in text.splitlines() if "torch" in line] == [["|", "torch", "|", "2.13.0", "|"]]


def test_what_was_written_is_what_is_read(document: dict[str, object], tmp_path: Path) -> None:
    source = written(document, tmp_path / "new" / "folder")["report.json"]
    found = reports.read(source)
    assert found.results == (HOLDS, BREAKS)
    assert found.targets == ("gpt2", "falcon_mqa", "my|model")
    assert json.loads(source.read_text()) == document


def test_snippet_of_a_failure_is_code_in_markdown_and_its_facts_are_kept(tmp_path: Path) -> None:
    place = {"layer": 1, "head": 2}
    failure = {"claim": "v stays", "place": place, "error": "inf", "bound": 0.0, "snippet": "x = [1]\ncheck_v(x)\n"}
    told = replace(BREAKS, failure=failure)
    source, shown, *_ = reports.write(reports.build(SETTINGS, {}, [told, BREAKS], ENDED), tmp_path)
    assert reports.read(source).results == (told, BREAKS)
    assert "at \\<token> 0\n\n  ```python\n  x = [1]\n  check_v(x)\n  ```\n\n- circuitfreeze/" in shown.read_text(
        "utf-8"
    )


def test_place_of_the_report_is_not_in_it(document: dict[str, object]) -> None:
    assert "secret" not in json.dumps(document)


def test_second_report_replaces_the_first(document: dict[str, object], tmp_path: Path) -> None:
    reports.write({**document, "results": []}, tmp_path)
    paths = reports.write(document, tmp_path)
    source = paths[0]
    assert len(reports.read(source).results) == 2
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert source.stat().st_mode & stat.S_IRUSR


def test_failed_write_leaves_the_old_report(
    document: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = reports.write(document, tmp_path)
    source = paths[0]
    before = source.read_text()

    def no_space(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(files.Path, "replace", no_space)
    with pytest.raises(OSError, match="no space left"):
        reports.write({**document, "results": []}, tmp_path)
    assert source.read_text() == before
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_number_that_is_not_finite_is_kept_in_strict_json(tmp_path: Path) -> None:
    endless = replace(HOLDS, bound=float("inf"))
    source = written(reports.build(SETTINGS, {}, [endless], ENDED), tmp_path)["report.json"]
    assert "Infinity" not in source.read_text()
    assert reports.read(source).results == (endless,)


def test_text_that_is_no_unicode_is_told_by_its_numbers(tmp_path: Path) -> None:
    odd = replace(BREAKS, message="no such file: caf\udce9")
    paths = written(reports.build(SETTINGS, {}, [odd], ENDED), tmp_path)
    for name in ("report.md", "report.html"):
        assert "caf\\udce9" in paths[name].read_text("utf-8").replace("\\\\", "\\")


def test_a_link_stays_and_what_it_leads_to_is_written(document: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "report.json").symlink_to(tmp_path / "kept" / "mine.json")
    reports.write(document, tmp_path)
    assert (tmp_path / "report.json").is_symlink()
    assert len(reports.read(tmp_path / "kept" / "mine.json").results) == 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is no circuitfreeze report: JSONDecodeError"),
        ("{}", "is no circuitfreeze report: KeyError: 'schema'"),
        ("[]", "is no circuitfreeze report: TypeError"),
        ('{"schema": 99}', "has schema 99; this version reads 2"),
        ('{"schema": 2, "results": [{"id": "x"}]}', "is no circuitfreeze report: KeyError: 'error'"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(ReportError) as caught:
        reports.read(path)
    assert str(caught.value).startswith(str(path))
    assert reason in str(caught.value)
