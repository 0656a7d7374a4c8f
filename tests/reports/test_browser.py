"""The page in a browser, at three widths and in both schemes of colours: cells open, nothing overflows or is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from documents import document

from pytest_circuitfreeze import reports

pytestmark = pytest.mark.browser
WIDTHS = (360, 820, 1400)
BRIGHTNESS = {"light": 255, "dark": 0}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = shutil.which("chromium"), shutil.which("chromedriver")
    if None in found:
        pytest.skip("no browser is installed (Debian: chromium, chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = found[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(found[1]))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("report")
    reports.write(document(), folder)
    return (folder / "report.html").as_uri()


@pytest.fixture(params=[(width, scheme) for width in WIDTHS for scheme in BRIGHTNESS], ids=str)
def page(request: pytest.FixtureRequest, browser: Any, address: str) -> Any:
    width, scheme = request.param
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    browser.get_log("performance")
    browser.get(address)
    return browser


def test_page_is_as_wide_as_the_window(page: Any) -> None:
    wide, window = page.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert wide <= window


def test_each_cell_opens_and_closes(page: Any) -> None:
    buttons = page.find_elements("css selector", ".matrix button")
    assert len(buttons) == 3
    for button in buttons:
        opened = page.find_element("id", button.get_attribute("popovertarget"))
        assert not opened.is_displayed()
        page.execute_script("arguments[0].click()", button)
        assert opened.is_displayed()
        box = opened.rect
        assert 0 <= box["x"] <= box["x"] + box["width"] <= page.execute_script("return window.innerWidth")
        assert opened.get_property("scrollWidth") <= opened.get_property("clientWidth")
        opened.find_element("css selector", ".close").click()
        assert not opened.is_displayed()


def test_colours_are_those_of_the_scheme(page: Any, request: pytest.FixtureRequest) -> None:
    _, scheme = request.node.callspec.params["page"]
    paper, ink = page.execute_script(
        "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color].map(c => +c.match(/\\d+/)[0])"
    )
    assert abs(paper - BRIGHTNESS[scheme]) < 40
    assert abs(ink - paper) > 150
    source = page.execute_script("return document.querySelector('picture img').currentSrc")
    light = page.execute_script("return document.querySelector('picture img').src")
    assert (source == light) == (scheme == "light")


def test_nothing_is_loaded_and_nothing_goes_wrong(page: Any, address: str) -> None:
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = {
        message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"
    }
    assert {url for url in asked if not url.startswith("data:")} == {address}
    assert page.get_log("browser") == []
    loaded = page.execute_script("return [...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert loaded
