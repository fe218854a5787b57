"""One browser for all tests of this folder, and reports made once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.remote.webdriver import WebDriver

from audit.reports.report import ReportConfig, report
from tests.browser.chromium import chromium
from tests.fabricate import HOSTILE, HOSTILE_URLS, add_confirm, make_run


@pytest.fixture(scope="session")
def browser() -> Iterator[WebDriver]:
    with chromium() as made:
        yield made


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Report of a run whose captions, URLs and training pictures' texts attack the page; every caption is confirmed."""
    urls = [HOSTILE_URLS[at % len(HOSTILE_URLS)] for at in range(len(HOSTILE))]
    run = make_run(tmp_path_factory.mktemp("hostile"), HOSTILE, urls=urls)
    verdicts = ("global", "local", "none", "no_reference")
    add_confirm(run, [verdicts[at % 4] for at in range(len(HOSTILE))])
    return Path(str(report(ReportConfig(run=run.url)).html))


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Report of 130 captions: 60 of one template, 70 with nothing in common; the best 8 confirmed, 3 images each."""
    captions = [f"Shaw Floors Oak {n}" for n in range(60)]
    captions += [f"{first}{second} {first} {second}" for first in "abcdefg" for second in "hijklmnopq"]
    scores = [10 - n / 10 for n in range(60)] + [9.95 - n / 10 for n in range(70)]
    run = make_run(tmp_path_factory.mktemp("plain"), captions, scores=scores, rows_per_shard=50)
    add_confirm(run, ["global", "local", "none", "global", "no_reference", "local", "none", "none"], num_images=3)
    return Path(str(report(ReportConfig(run=run.url, top_k=1000)).html))
