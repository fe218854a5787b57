"""A headless Chromium that keeps its console and every request it makes, for tests, benchmarks and screenshots."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import WebDriverWait

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
)


@contextmanager
def chromium(width: int = 1360, height: int = 1000) -> Iterator[WebDriver]:
    """A browser of its own.

    Raises:
        RuntimeError: chromium or chromedriver is not installed.
    """
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser or not driver:
        raise RuntimeError("the browser tests need Chromium: apt-get install chromium chromium-driver")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = Options()
        options.binary_location = browser
        for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        made = webdriver.Chrome(options=options, service=Service(driver))
        try:
            yield made
        finally:
            made.quit()


def open_page(browser: WebDriver, page: Path | str, timeout: float = 60) -> None:
    """Open a report and wait until its table is there."""
    browser.get(Path(page).resolve().as_uri() if not str(page).startswith("http") else str(page))
    wait(browser, "return document.documentElement.dataset.ready === ''", timeout)


def wait(browser: WebDriver, script: str, timeout: float = 20) -> Any:
    """Wait until a script returns something true; returns it."""
    return WebDriverWait(browser, timeout, poll_frequency=0.02).until(lambda page: page.execute_script(script))


def console(browser: WebDriver) -> list[str]:
    """What the page has logged since the last call: errors, and violations of its Content-Security-Policy."""
    return [entry["message"] for entry in browser.get_log("browser")]


def requests(browser: WebDriver) -> list[str]:
    """URLs requested since the last call, by whatever means."""
    urls = []
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            urls.append(message["params"]["request"]["url"])
    return urls
