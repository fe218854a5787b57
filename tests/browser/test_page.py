"""The report in a real browser: it loads from disk, sorts, filters, searches, pages, opens, and runs no caption."""

from __future__ import annotations

import functools
import http.server
import json
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import Select

from tests.browser.chromium import console, open_page, requests, wait
from tests.fabricate import HOSTILE


def captions(browser: WebDriver) -> list[str]:
    """Captions of the rows shown, details and finding heads left out."""
    script = "return [...document.querySelectorAll('#rows > tr[id] td.caption bdi')].map((each) => each.textContent)"
    return list(browser.execute_script(script))


def exported(page: Path) -> list[dict]:
    return pq.read_table(page.parent / "exports" / "flagged.parquet").to_pylist()


def show_all(browser: WebDriver, page: Path) -> None:
    """Open a report ungrouped, 250 rows a page."""
    open_page(browser, page)
    browser.find_element(By.ID, "grouped").click()
    Select(browser.find_element(By.ID, "size")).select_by_visible_text("250")


def press(browser: WebDriver, selector: str) -> None:
    """Click what may lie under the table's sticky head."""
    target = browser.find_element(By.CSS_SELECTOR, selector)
    browser.execute_script("arguments[0].scrollIntoView({ block: 'center' })", target)
    target.click()


def search(browser: WebDriver, text: str) -> None:
    box = browser.find_element(By.ID, "search")
    box.clear()
    before = browser.find_element(By.ID, "status").text
    box.send_keys(text)
    wait(browser, f"return document.getElementById('status').textContent !== {json.dumps(before)}")


def test_it_loads_from_disk_without_an_error_or_a_request_to_anywhere(browser: WebDriver, plain: Path) -> None:
    console(browser)
    requests(browser)
    open_page(browser, plain)
    for button in range(3):
        browser.find_elements(By.CSS_SELECTOR, "button.open")[button].click()
    wait(browser, "return document.querySelectorAll('tr.detail').length > 0")
    assert console(browser) == []
    urls = requests(browser)
    assert {"index.html", "report.js", "report.css", "data.js"} <= {url.rsplit("/", 1)[-1] for url in urls}
    assert [url for url in urls if not url.startswith(("file:///", "data:image/png;"))] == []


def test_it_works_from_a_static_server(browser: WebDriver, plain: Path) -> None:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(plain.parent))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        origin = f"http://127.0.0.1:{server.server_port}/"
        console(browser)
        requests(browser)
        open_page(browser, origin + "index.html#row-0")
        wait(browser, "return document.querySelectorAll('tr.detail .picture').length === 4")
        wait(browser, "return [...document.querySelectorAll('tr.detail img')].every((img) => img.naturalWidth > 0)")
        assert console(browser) == []
        assert [url for url in requests(browser) if not url.startswith((origin, "data:image/png;"))] == []
    finally:
        server.shutdown()


def test_a_hostile_run_executes_nothing_and_shows_its_captions_as_they_are(browser: WebDriver, hostile: Path) -> None:
    console(browser)
    open_page(browser, hostile)
    shown = captions(browser)
    assert sorted(shown) == sorted(row["caption"] for row in exported(hostile))
    assert {caption for caption in HOSTILE if "\x00" not in caption} <= set(shown)
    for button in range(len(HOSTILE)):
        browser.find_elements(By.CSS_SELECTOR, "#rows > tr[id] button.open")[button].click()
    wait(browser, f"return document.querySelectorAll('.opened').length === {len(HOSTILE)}")
    browser.execute_script("document.querySelectorAll('.opened details').forEach((each) => { each.open = true; })")
    assert browser.execute_script("return [window.hacked, document.scripts.length]") == [None, 2 + len(HOSTILE)]
    links = browser.execute_script("return [...document.querySelectorAll('.opened a')].map((a) => a.protocol)")
    assert set(links) == {"https:", "file:"}  # file: is a row's link to itself
    own = browser.execute_script("return [...document.querySelectorAll('.opened a[href^=\"#\"]')].length")
    assert links.count("file:") == own
    opened = browser.execute_script("return [...document.querySelectorAll('.opened .whole')].map((p) => p.textContent)")
    assert sorted(opened) == sorted(shown)
    assert console(browser) == []


def test_a_script_injected_into_the_page_is_stopped_by_the_policy(browser: WebDriver, plain: Path) -> None:
    open_page(browser, plain)
    browser.execute_script("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hacked = 1\">')")
    wait(browser, "return document.images[document.images.length - 1].complete")
    assert browser.execute_script("return window.hacked") is None
    assert any("Content Security Policy" in line for line in console(browser))


@pytest.mark.parametrize("name", ["ld_energy", "caption", "best_sscd", "q_value"])
def test_sorting_by_a_column_both_ways_with_missing_values_last(browser: WebDriver, plain: Path, name: str) -> None:
    show_all(browser, plain)
    rows = [row for row in exported(plain) if row[name] is not None]
    missing = {row["caption"] for row in exported(plain) if row[name] is None}
    value = {row["caption"]: row[name].lower() if name == "caption" else row[name] for row in rows}
    button = f"#heads [data-name='{name}']"
    seen = set()
    for _ in range(2):
        browser.find_element(By.CSS_SELECTOR, button).click()
        order = browser.find_element(By.CSS_SELECTOR, "#heads th[aria-sort]").get_attribute("aria-sort")
        seen.add(order)
        shown = captions(browser)
        values = [value[caption] for caption in shown if caption in value]
        assert values == sorted(values, reverse=order == "descending") and len(values) == len(rows)
        assert set(shown[len(rows) :]) == missing
    assert seen == {"ascending", "descending"}


def test_any_score_can_be_shown_and_sorted_by(browser: WebDriver, plain: Path) -> None:
    show_all(browser, plain)
    Select(browser.find_element(By.ID, "score")).select_by_visible_text("magnitude")
    heads = [head.text for head in browser.find_elements(By.CSS_SELECTOR, "#heads th")]
    assert "magnitude ↓" in heads
    best = max(exported(plain), key=lambda row: row["magnitude"])
    assert captions(browser)[0] == best["caption"]
    shown = browser.find_element(By.CSS_SELECTOR, "#rows td.number").text
    assert float(shown) == pytest.approx(best["magnitude"], rel=1e-3)


def test_verdicts_filter_and_search_narrows_by_every_word(browser: WebDriver, plain: Path) -> None:
    show_all(browser, plain)
    browser.find_element(By.CSS_SELECTOR, "#verdicts input[value='global']").click()
    browser.find_element(By.CSS_SELECTOR, "#verdicts input[value='local']").click()
    copied = [row["caption"] for row in exported(plain) if row["verdict"] in ("global", "local")]
    assert captions(browser) == copied and len(copied) == 4
    browser.find_element(By.CSS_SELECTOR, "#verdicts input[value='global']").click()
    browser.find_element(By.CSS_SELECTOR, "#verdicts input[value='local']").click()
    assert len(captions(browser)) == 130
    search(browser, "OAK floors 1")
    texts = {row["caption"]: f"{row['caption']} {row['source_url']} {row['source_key']}" for row in exported(plain)}
    assert captions(browser) == [caption for caption, text in texts.items() if "Oak" in text and "1" in text]
    search(browser, "k0000123")  # by key
    assert len(captions(browser)) == 1
    search(browser, "nothing like this")
    assert captions(browser) == [] and "Nothing matches" in browser.find_element(By.ID, "rows").text


def test_paging_shows_every_row_once(browser: WebDriver, plain: Path) -> None:
    open_page(browser, plain)
    browser.find_element(By.ID, "grouped").click()
    seen = captions(browser)
    assert len(seen) == 50 and not browser.find_element(By.ID, "previous").is_enabled()
    while browser.find_element(By.ID, "next").is_enabled():
        browser.find_element(By.ID, "next").click()
        seen += captions(browser)
    assert seen == [row["caption"] for row in exported(plain)]
    assert browser.find_element(By.ID, "page").text == "Page 3 of 3"


def test_a_template_is_one_finding_that_opens_to_its_captions(browser: WebDriver, plain: Path) -> None:
    open_page(browser, plain)
    assert browser.find_element(By.ID, "status").text == "71 findings, 130 of 130 flagged captions"
    group = browser.find_element(By.CSS_SELECTOR, "tr.group")
    assert "Shaw Floors Oak #" in group.text and "60 captions" in group.text
    group.find_element(By.CSS_SELECTOR, "button.open").click()
    assert len(browser.find_elements(By.CSS_SELECTOR, "tr.member[id]")) == 50
    browser.find_element(By.CSS_SELECTOR, "tr.member:not([id]) button").click()
    assert len(browser.find_elements(By.CSS_SELECTOR, "tr.member[id]")) == 60


def test_an_opened_row_overlays_fades_and_subtracts(browser: WebDriver, plain: Path) -> None:
    browser.get("about:blank")
    browser.get(plain.as_uri() + "#row-0")
    wait(browser, "return document.querySelectorAll('tr.detail .picture').length === 4")

    def style(selector: str, name: str) -> str:
        script = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
        return str(browser.execute_script(script, selector, name))

    assert style(".mask", "display") == "block" and style(".mask", "opacity") == "0.6"
    assert style(".stack .over", "mixBlendMode") == "difference"
    sliders = browser.find_elements(By.CSS_SELECTOR, ".controls input[type=range]")
    browser.execute_script("arguments[0].value = 0.25; arguments[0].dispatchEvent(new Event('input'))", sliders[0])
    assert style(".mask", "opacity") == "0.25"
    browser.execute_script("arguments[0].value = 5; arguments[0].dispatchEvent(new Event('input'))", sliders[1])
    assert style(".difference", "filter") == "brightness(5)"
    energy = browser.find_element(By.CSS_SELECTOR, ".mask").get_attribute("src")
    choice = Select(browser.find_element(By.CSS_SELECTOR, ".controls select"))
    assert len(choice.options) == 4
    choice.select_by_value("be_mask")
    assert browser.find_element(By.CSS_SELECTOR, ".mask").get_attribute("src") != energy
    assert style(".mask", "opacity") == "0.25"  # a new mask keeps the setting
    press(browser, ".controls input[type=checkbox]")
    assert style(".mask", "display") == "none"
    choice.select_by_value("energy_mask")
    assert style(".mask", "display") == "none"
    press(browser, "tr.detail ~ tr.member button.open")
    assert style(".mask", "display") == "none"  # another row was opened: this one stays as it was set
    first = browser.find_element(By.CSS_SELECTOR, ".picture").get_attribute("src")
    steps = "return [...document.querySelectorAll('figure.steps polyline')].map((line) => line.getAttribute('points'))"
    curves = browser.execute_script(steps)
    press(browser, ".others button:nth-child(2)")
    assert browser.find_element(By.CSS_SELECTOR, ".picture").get_attribute("src") != first
    others = browser.execute_script(steps)
    assert len(others) == len(curves) == 4 and others[:2] != curves[:2] and others[2:] == curves[2:]


def test_an_opened_row_tells_every_number_and_where_it_comes_from(browser: WebDriver, plain: Path) -> None:
    browser.get("about:blank")
    open_page(browser, plain)
    browser.execute_script("location.hash = '#row-0'")
    wait(browser, "return document.querySelectorAll('tr.detail .picture').length === 4")
    row = next(row for row in exported(plain) if row["row_id"] == 0)
    text = browser.find_element(By.CSS_SELECTOR, "tr.detail").text
    for part in (row["caption"], row["source_url"], row["best_reference_key"], "key k0000000", "cosine of the SSCD"):
        assert part in text
    script = "(dt) => [dt.textContent, dt.nextSibling.firstChild.textContent]"
    shown = dict(browser.execute_script(f"return [...document.querySelectorAll('.numbers dt')].map({script})"))
    for name in ("magnitude", "ld", "ld_energy", "webster", "ld_10", "magnitude_all"):
        assert float(shown[name]) == pytest.approx(row[name], rel=1e-3), name
    assert float(shown["sscd"]) == pytest.approx(row["best_sscd"], rel=1e-3)
    assert "javascript:window.hacked=1" in text  # its training picture's URL: text, not a link


def test_a_link_to_a_row_finds_it_on_its_page_and_inside_its_finding(browser: WebDriver, plain: Path) -> None:
    last = exported(plain)[-1]["row_id"]
    browser.get("about:blank")
    browser.get(f"{plain.as_uri()}#row-{last}")
    wait(browser, f"return !!document.getElementById('row-{last}')")
    browser.get("about:blank")
    browser.get(f"{plain.as_uri()}#row-{(1 << 32) | 9}")  # the last caption of the template, beyond the first 50
    wait(browser, f"return !!document.getElementById('row-{(1 << 32) | 9}')")


def test_the_keyboard_alone_searches_opens_and_sorts(browser: WebDriver, plain: Path) -> None:
    browser.get("about:blank")
    open_page(browser, plain)
    browser.find_element(By.TAG_NAME, "body").send_keys("/")
    assert browser.switch_to.active_element.get_attribute("id") == "search"
    browser.switch_to.active_element.send_keys("shaw")
    wait(browser, "return document.getElementById('status').textContent.startsWith('1 finding')")
    for _ in range(40):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        if "open" in (browser.switch_to.active_element.get_attribute("class") or ""):
            break
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    opener = browser.switch_to.active_element
    assert opener.get_attribute("aria-expanded") == "true"  # focus stays where it was
    assert len(captions(browser)) == 50
    opener.send_keys(Keys.ENTER)
    assert captions(browser) == []


CONTRAST = """
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgba = (text) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const mix = (top, under, share) => top * share + under * (1 - share);
  const over = (top, under) => [0, 1, 2].map((at) => mix(top[at], under[at], top[3] / 255)).concat(255);
  const ground = (node) => {
    const layers = [];
    for (let at = node; at; at = at.parentElement) layers.push(rgba(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255, 255]);
  };
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const weak = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode.parentElement;
    const text = walk.currentNode.textContent.trim();
    if (!text || !node.checkVisibility() || node.closest('svg, option, :disabled')) continue;
    const under = ground(node), a = light(over(rgba(getComputedStyle(node).color), under)), b = light(under);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) weak.push(`${node.tagName}.${node.className}: ${ratio.toFixed(2)} ${text.slice(0, 30)}`);
  }
  return weak;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_readable_contrast(browser: WebDriver, plain: Path, scheme: str) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get("about:blank")
    browser.get(plain.as_uri() + "#row-0")
    wait(browser, "return document.querySelectorAll('tr.detail .picture').length === 4")
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground.removeprefix("rgb(").removesuffix(")").split(","))) < 384) == (scheme == "dark")
    assert browser.execute_script(CONTRAST) == []
    browser.find_element(By.ID, "theme").click()
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") != ground
    assert browser.execute_script(CONTRAST) == []
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_print_leaves_the_controls_out_and_opens_the_method(browser: WebDriver, plain: Path) -> None:
    browser.get("about:blank")
    open_page(browser, plain)
    browser.execute_cdp_cmd("Page.printToPDF", {})
    assert browser.execute_script("return document.querySelector('details.panel').open") is True
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    hidden = browser.execute_script(
        "return ['toolbar', 'pager', 'theme'].map((id) => document.getElementById(id).checkVisibility())"
    )
    assert hidden == [False, False, False]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_a_narrow_screen_does_not_scroll_sideways(browser: WebDriver, plain: Path) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    )
    browser.get("about:blank")
    open_page(browser, plain)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    browser.execute_script("location.hash = '#row-0'")
    wait(browser, "return document.querySelectorAll('tr.detail .picture').length === 4")
    assert browser.execute_script("return document.querySelector('.opened').getBoundingClientRect().right") <= 390
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
