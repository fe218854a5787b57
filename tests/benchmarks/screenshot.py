"""Pictures of the report for README and docs, taken in headless Chromium.

    python tests/benchmarks/screenshot.py REPORT [FOLDER]

REPORT is a folder made by `be-audit report`; pictures go to docs/images by default: report.png (first screen),
report-row.png (a reproduced caption opened) and report-dark.png (the same, dark).
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image
from selenium.webdriver.remote.webdriver import WebDriver

from tests.browser.chromium import chromium, console, open_page, wait

WIDTH, HEIGHT = 1280, 900


def save(browser: WebDriver, path: Path) -> None:
    """The visible page as a PNG of at most 256 colours: a sixth of the size, and no difference to the eye."""
    picture = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path, path.stat().st_size, "bytes")


def open_row(browser: WebDriver) -> None:
    """Open the first caption with pictures, of the first finding of several captions where there is one."""
    group = "document.querySelector('tr.group .thumbs')?.closest('button')"
    if browser.execute_script(f"return !!{group}"):
        browser.execute_script(f"{group}.click()")
    row = "(document.querySelector('tr.member .thumbs') ?? document.querySelector('tr[id] .thumbs'))"
    browser.execute_script(f"{row}.closest('button').click()")
    wait(browser, "return document.querySelectorAll('tr.detail .picture').length > 0")
    wait(browser, "return [...document.querySelectorAll('tr.detail img')].every((img) => img.complete)")
    browser.execute_script(
        "document.activeElement.blur(); document.querySelector('tr.detail').previousSibling.scrollIntoView()"
    )


def main(report: Path, folder: Path) -> None:
    """Take them all."""
    folder.mkdir(parents=True, exist_ok=True)
    with chromium(WIDTH, HEIGHT) as browser:
        open_page(browser, report / "index.html")
        wait(browser, "return [...document.images].every((img) => img.complete || img.loading === 'lazy')")
        save(browser, folder / "report.png")
        open_row(browser)
        save(browser, folder / "report-row.png")
        browser.execute_script("document.documentElement.style.colorScheme = 'dark'")
        save(browser, folder / "report-dark.png")
        for line in console(browser):
            print("console:", line)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "docs/images"))
