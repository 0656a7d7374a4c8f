"""What is made of a document: HTML, LaTeX, plots; names that mean something there are harmless."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from documents import ALL, BREAKS, ENDED, EVIL, EXACT, HOLDS, SETTINGS, document

from pytest_circuitfreeze import reports
from pytest_circuitfreeze.reports.__main__ import main

FACES = {
    "report.json",
    "report.md",
    "report.html",
    "claims.tex",
    "benchmarks.tex",
    "bounds.svg",
    "bounds.png",
    "benchmarks.svg",
    "benchmarks.png",
}


class Page(HTMLParser):
    """What is on a page: its tags, and what is read of it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.read: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.read.append(data)


@pytest.fixture
def faces(tmp_path: Path) -> dict[str, Path]:
    return {path.name: path for path in reports.write(document(), tmp_path / "new")}


def test_every_face_is_there(faces: dict[str, Path]) -> None:
    assert faces.keys() == FACES
    assert faces["bounds.png"].read_bytes()[:4] == b"\x89PNG"


def test_page_needs_nothing_from_elsewhere(faces: dict[str, Path]) -> None:
    page = Page(faces["report.html"].read_text("utf-8"))
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in page.tags:
        for name in ("src", "srcset", "href"):
            address = attributes.get(name) or "#"
            assert address.startswith(("#", "data:")), (tag, address[:40])
        assert not any(name.startswith("on") for name in attributes)


def test_each_cell_opens_a_part_of_the_page(faces: dict[str, Path]) -> None:
    page = Page(faces["report.html"].read_text("utf-8"))
    opened = {attributes["id"] for _, attributes in page.tags if "popover" in attributes}
    openers = {a["popovertarget"] for tag, a in page.tags if tag == "button" and "popovertargetaction" not in a}
    assert len(openers) == 3
    assert openers == opened


def test_page_says_what_was_checked_how_closely_and_what_was_found(faces: dict[str, Path]) -> None:
    text = " ".join(" ".join(Page(faces["report.html"].read_text("utf-8")).read).split())
    assert "25 in 0.5 s" in text
    assert "1e-09, of 4e-09 that rounding allows" in text
    assert "0, as it must be: bit for bit" in text
    assert "layer 1, head 2" in text
    assert "x = '```' check_v(x)" in text
    assert "1.040 [1.030, 1.050] n=30" in text
    assert text.count(EVIL) > 5


def test_names_are_text_in_markdown(faces: dict[str, Path]) -> None:
    text = faces["report.md"].read_text("utf-8")
    outside = re.sub(r"  ````python\n.*?  ````\n", "", text, flags=re.DOTALL)
    assert len(outside) < len(text)
    for special in ("<script", "![i]", "`x`", "|`"):
        assert not re.search(rf"(?<!\\){re.escape(special)}", outside), special
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("| Frozen")}
    assert widths == {6}


def test_no_row_begins_with_what_latex_takes_for_an_option(tmp_path: Path) -> None:
    rows = tuple(replace(HOLDS, id=f"a.py::test_{one}", claim=one, sentence=f"{one}1] holds.") for one in "[*")
    made = {path.name: path for path in reports.write(document(rows), tmp_path / "new")}["claims.tex"].read_text(
        "utf-8"
    )
    assert "\n {[}1] holds." in made
    assert "\n {*}1] holds." in made


@pytest.mark.latex
def test_latex_compiles_whatever_names_are(faces: dict[str, Path], tmp_path: Path) -> None:
    command = shutil.which("pdflatex")
    if command is None:
        pytest.skip("pdflatex is not installed (Debian: texlive-latex-recommended)")
    folder = faces["claims.tex"].parent
    for name in ("claims", "benchmarks"):  # a mark of the direction of writing is no letter of pdflatex's
        path = folder / f"{name}.tex"
        path.write_text(path.read_text("utf-8").replace("\u202e", ""), "utf-8")
    source = (
        r"\documentclass{article}\usepackage{booktabs}\begin{document}\input{claims}\input{benchmarks}\end{document}"
    )
    (folder / "paper.tex").write_text(source)
    ran = subprocess.run([command, "-interaction=nonstopmode", "paper.tex"], cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-2000:]


def test_same_report_gives_the_same_files(faces: dict[str, Path], tmp_path: Path) -> None:
    again = {path.name: path for path in reports.write(document(), tmp_path / "again")}
    for name, path in faces.items():
        assert again[name].read_bytes() == path.read_bytes(), name


def test_faces_are_rendered_anew_of_the_document(
    faces: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["render", str(faces["report.json"].parent), "--into", str(tmp_path / "other")]) == 0
    shown = capsys.readouterr().out.split()
    assert {Path(path).name for path in shown} == FACES - {"report.json"}
    for path in map(Path, shown):
        assert path.read_bytes() == faces[path.name].read_bytes()


def test_what_a_former_report_had_and_this_one_has_not_is_gone(faces: dict[str, Path]) -> None:
    folder = faces["report.json"].parent
    folder.joinpath("mine.svg").touch()
    reports.write(document((EXACT,)), folder)
    assert {path.name for path in folder.iterdir()} == {
        "report.json",
        "report.md",
        "report.html",
        "claims.tex",
        "mine.svg",
    }


def test_without_matplotlib_there_are_no_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    names = {path.name for path in reports.write(document(), tmp_path)}
    assert names == {name for name in FACES if not name.endswith((".svg", ".png"))}
    assert "<img" not in (tmp_path / "report.html").read_text("utf-8")


def test_run_that_was_stopped_says_so(tmp_path: Path) -> None:
    built = reports.build(SETTINGS, {}, (HOLDS,), ENDED._replace(status=2, complete=False))
    reports.write(built, tmp_path)
    for name in ("report.md", "report.html"):
        assert "was stopped before its end" in (tmp_path / name).read_text("utf-8")
    reports.write(document(ALL), tmp_path)
    for name in ("report.md", "report.html"):
        assert "was stopped" not in (tmp_path / name).read_text("utf-8")


def test_benchmarks_are_no_claims(tmp_path: Path) -> None:
    reports.write(document(), tmp_path)
    report = reports.read(tmp_path / "report.json")
    assert report.results == (HOLDS, EXACT, BREAKS)
    assert len(report.benchmarks) == 2
    assert "1 claim on 3 models: 1 failed, 2 passed; 53 examples" in (tmp_path / "report.md").read_text("utf-8")
