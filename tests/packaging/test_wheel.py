"""The wheel: it holds what the checkout does, under two names and no other, and works away from the checkout."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from textwrap import dedent

import pytest

CHECKOUT = Path(__file__).parents[2]
INSTALLED_AS = {
    "freeze_core": "freeze_core",
    "pytest_circuitfreeze": "pytest_circuitfreeze",
    "suites": "pytest_circuitfreeze/suites",
    "reports": "pytest_circuitfreeze/reports",
}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the checkout, built without a network and without leaving anything in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", *INSTALLED_AS):
        (source / name).symlink_to(CHECKOUT / name)
    built = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", built, source]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel's files and nothing else, in front of what this environment has installed."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_wheel_holds_what_the_checkout_does(installed: Path) -> None:
    expected = {
        Path(target, path.relative_to(CHECKOUT / source))
        for source, target in INSTALLED_AS.items()
        for path in (CHECKOUT / source).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    found = {path.relative_to(installed) for path in installed.rglob("*") if path.is_file()}
    assert {path for path in found if not path.parts[0].endswith(".dist-info")} == expected


def test_wheel_has_two_names_and_no_other(installed: Path) -> None:
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"freeze_core", "pytest_circuitfreeze"}
    assert (installed / "freeze_core" / "py.typed").is_file()
    assert (installed / "pytest_circuitfreeze" / "py.typed").is_file()


def run(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest with the wheel's files, in a folder of a user's, apart from the checkout's editable install."""
    start = f"import sys; sys.path.insert(0, {str(installed)!r}); sys.meta_path[:] = [f for f in sys.meta_path if "
    start += "'editable' not in type(f).__module__ + getattr(f, '__module__', '')]; import pytest; "
    start += f"sys.exit(pytest.main({list(arguments)!r}))"
    command = [sys.executable, "-P", "-c", start]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)


def test_suites_run_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "from pathlib import Path\n"
        "import pytest_circuitfreeze.suites as suites, freeze_core\n"
        "Path('from.txt').write_text(f'{list(suites.__path__)} {list(freeze_core.__path__)}')"
    )
    result = run(
        installed, tmp_path, "--circuitfreeze", "--circuitfreeze-arch=gpt2", "--circuitfreeze-profile=quick",
        "-W", "error", "-q", "-k", "removal", "circuitfreeze",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    used = (tmp_path / "from.txt").read_text()
    assert used == f"['{installed}/pytest_circuitfreeze/suites'] ['{installed}/freeze_core']"
    assert " passed" in result.stdout


STRANGER = """
    import os
    import random
    from pathlib import Path

    import pytest
    import torch

    import freeze_core
    from pytest_circuitfreeze import suites

    Path(f"from-{os.getpid()}.txt").write_text(f"{list(suites.__path__)} {list(freeze_core.__path__)}")

    @pytest.fixture(autouse=True)
    def same_draws():
        random.seed(0)
        torch.manual_seed(0)

    @pytest.fixture(autouse=True)
    def in_a_folder_of_its_own(tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        yield
        assert torch.is_grad_enabled()

    @pytest.fixture(autouse=True, params=["once", "twice"])
    def both_ways(request):
        return request.param

    @pytest.fixture(autouse=True, scope="module")
    def about_the_module(request):
        yield request.module.__name__

    def pytest_collection_modifyitems(items):
        items.reverse()
"""


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["one process", "two workers"])
def test_suites_run_in_a_project_full_of_autouse_fixtures(
    installed: Path, tmp_path: Path, workers: tuple[str, ...]
) -> None:
    (tmp_path / "conftest.py").write_text(dedent(STRANGER))
    result = run(
        installed, tmp_path, "--circuitfreeze", "--circuitfreeze-arch=gpt2", "--circuitfreeze-profile=quick",
        "-W", "error", "-k", "generators", *workers, "circuitfreeze",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 passed" in result.stdout
    used = [path.read_text() for path in tmp_path.glob("from-*.txt")]
    processes = 3 if workers else 1
    assert used == [f"['{installed}/pytest_circuitfreeze/suites'] ['{installed}/freeze_core']"] * processes


def test_checkout_that_hides_the_wheel_is_a_usage_error(installed: Path, tmp_path: Path) -> None:
    hidden = tmp_path / "pytest_circuitfreeze"
    hidden.symlink_to(CHECKOUT / "pytest_circuitfreeze")
    result = run(tmp_path, tmp_path, "--circuitfreeze")
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert "pytest_circuitfreeze.suites not found" in result.stderr
    assert "PYTHONSAFEPATH=1" in result.stderr
