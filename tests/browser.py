"""A headless Chromium: for the tests of the pages, and for their screenshots."""

import shutil
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "headless",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "hide-scrollbars",
)
PATIENCE = 60.0  # seconds; the processors may be busy


@contextmanager
def chromium() -> Generator[Any]:
    """Debian's Chromium, driven by Selenium; a test is skipped where one of them is absent."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("chromium is not installed: make browser")
    webdriver = pytest.importorskip(
        "selenium.webdriver", reason="selenium is not installed: pip install selenium"
    )
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for flag in (*FLAGS, f"user-data-dir={folder}"):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        started.set_page_load_timeout(PATIENCE)
        try:
            yield started
        finally:
            started.quit()


def show(browser: Any, page: Path, width: int = 1400, scheme: str = "light", height: int = 900) -> None:
    """Opens a page in a window of this width and colour scheme and waits for its charts."""
    resize(browser, width, height)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page.absolute().as_uri())
    if browser.execute_script("return document.getElementById('charts') !== null"):
        wait(lambda: browser.execute_script("return document.documentElement.dataset.charts") == "drawn")


def resize(browser: Any, width: int, height: int) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def wait(condition: Callable[[], bool]) -> None:
    """Waits until a condition holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "the page did not get there"
        time.sleep(0.05)


def look(browser: Any, page: Path, width: int, scheme: str, open_layer: int | None = None) -> bytes:
    """The whole page as a PNG file, one of its layers open."""
    show(browser, page, width, scheme)
    buttons = browser.find_elements("css selector", ".layer th button")
    if open_layer is not None and buttons:
        browser.execute_script("arguments[0].click()", buttons[min(open_layer, len(buttons) - 1)])
    resize(browser, width, browser.execute_script("return document.documentElement.scrollHeight"))
    time.sleep(1.0)  # charts follow the window with a delay
    return browser.get_screenshot_as_png()
