"""An opened row of the report shows what mitigation did: pictures side by side, numbers before and after."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from selenium.webdriver.remote.webdriver import WebDriver

from audit.mitigation.mitigate_shard import mitigated_table
from audit.reports.report import ReportConfig, report
from audit.run.read import read_stage
from audit.run.run import Run
from audit.run.stage import CONFIRM, MITIGATE, Stage
from tests.browser.chromium import console, wait
from tests.fabricate import add_confirm, make_run, png

PICTURES = """
const made = [...document.querySelectorAll('tr.detail .mitigation img')];
if (!made.length || made.some((img) => !img.naturalWidth)) return null;
return made.map((img) => [img.alt, img.src.split('/').pop()]);
"""


@dataclass(frozen=True)
class OfConfirm:
    """Of which confirm's verdicts a mitigation is."""

    confirm: str


def add_mitigation(run: Run, confirm_digest: str) -> None:
    """Image 0 of the first two candidates: one mitigated to a red picture, one below the trigger; image 1 failed."""
    table = read_stage(run, "trajectories")
    assert table is not None
    items = table.select(["row_id", "image_index", "caption"]).slice(0, 4)
    items = items.append_column("shard", pa.array(np.zeros(4), pa.int32()))
    stage = Stage.begin(run, MITIGATE, OfConfirm(confirm_digest), items)
    rows = []
    for at, row in enumerate(table.slice(0, 4).select(["row_id", "image_index", "caption", "image"]).to_pylist()):
        image = row.pop("image")
        row |= {"error": "out of <b>luck</b>" if at == 1 else None, "triggered": at == 0, "loss": "ld", "target": 0.4}
        if at != 1:
            row |= {"image_before": image, "image_after": png(np.full((16, 16, 3), (255, 0, 0), np.uint8))}
            row |= {"iterations": 7, "sscd_before": 0.875, "sscd_after": 0.125 if at == 0 else 0.875}
            row |= {"verdict_before": "global", "verdict_after": "none" if at == 0 else "global"}
        rows.append(row)
    stage.ledger.commit(0, mitigated_table(rows))


def page_of(folder: Path, of_this_confirm: bool) -> Path:
    run = make_run(folder, [f"caption {word}" for word in ("ant", "bee", "cat")], scores=[3, 2, 1])
    add_confirm(run, ["global", "global", "none"], num_images=2)
    digest = Stage.open(run, CONFIRM).facts.digest
    add_mitigation(run, digest if of_this_confirm else "an earlier one")
    return Path(str(report(ReportConfig(run=run.url)).html))


def opened(browser: WebDriver, page: Path, row: int) -> str:
    """Text of a row's mitigation, empty without one."""
    browser.get("about:blank")  # another fragment alone would not load the page again
    browser.get(f"{page.resolve().as_uri()}#row-{row}")
    wait(browser, "return document.querySelectorAll('tr.detail .picture').length > 0")
    script = "return document.querySelector('tr.detail .mitigation')?.innerText ?? ''"
    return str(browser.execute_script(script))


def test_pictures_and_numbers_stand_side_by_side(browser: WebDriver, tmp_path: Path) -> None:
    page = page_of(tmp_path, of_this_confirm=True)
    console(browser)
    text = opened(browser, page, 0)
    assert "0.875 → 0.125" in text and "global → none" in text and "7 updates, target 0.4" in text
    assert "image 1: out of <b>luck</b>" in text
    found = wait(browser, PICTURES)
    names = [["image 0, before", "0-0.png"], ["image 0, after", "0-0-mitigated.png"]]
    assert found == names
    left = opened(browser, page, 1)
    assert "left as it was" in left and "0.875 → 0.875" in left
    assert wait(browser, PICTURES)[1] == ["image 0, after", "1-0.png"]  # the same file
    assert opened(browser, page, 2) == ""
    assert console(browser) == []


def test_a_mitigation_of_earlier_verdicts_is_not_shown(browser: WebDriver, tmp_path: Path) -> None:
    assert opened(browser, page_of(tmp_path, of_this_confirm=False), 0) == ""
