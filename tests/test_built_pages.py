"""The pages as a reader gets them: built without a warning, whole, and asking nothing of a network."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from sphinx.util.inventory import InventoryFile

import freeze_core
from pytest_circuitfreeze import checks
from pytest_circuitfreeze.settings import OPTIONS

DOCS = Path(__file__).parent.parent / "docs"
LOADED_BY = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built pages; a warning is an error."""
    built = tmp_path_factory.mktemp("pages")
    # The checkout's own folder must not hide what is installed.
    command = [
        sys.executable,
        "-P",
        "-m",
        "sphinx",
        "-W",
        "-n",
        "--keep-going",
        "-q",
        "-d",
        f"{built}-read",
        DOCS,
        built,
    ]
    result = subprocess.run(command, cwd=built, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return built


def test_every_public_name_has_its_place(pages: Path) -> None:
    inventory = InventoryFile.loads((pages / "objects.inv").read_bytes(), uri="")
    documented = {name for kind in inventory.data.values() for name in kind}
    wanted = {f"freeze_core.{name}" for name in freeze_core.__all__} | {
        f"pytest_circuitfreeze.checks.{name}" for name in checks.__all__
    }
    assert sorted(wanted - documented) == [], "in docs/api there is no entry for these"


def test_options_and_claims_are_those_of_the_code(pages: Path) -> None:
    plugin = (pages / "api" / "plugin.html").read_text(encoding="utf-8")
    assert [option.flag for option in OPTIONS if f">{option.flag}<" not in plugin] == []
    shown = (pages / "api" / "checks.html").read_text(encoding="utf-8")
    assert [name for name in checks.claims() if f"check_{name}" not in shown] == []


class Loads(HTMLParser):
    """Keeps the addresses that a page makes a browser load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keeps what this tag loads."""
        address = dict(attrs).get(LOADED_BY.get(tag, ""))
        if address:
            self.found.append(address)


def test_no_page_loads_anything_from_elsewhere(pages: Path) -> None:
    for page in pages.rglob("*.html"):
        loads = Loads()
        loads.feed(page.read_text(encoding="utf-8"))
        assert loads.found
        for address in loads.found:
            assert not address.startswith(("http:", "https:", "//")), f"{page.name} loads {address}"
    for sheet in pages.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert "@import" not in text
        assert "url(http" not in text
        assert "url(//" not in text
