"""The report's page in a real browser: filter, sort, point at, take away, offline, light and dark and on paper."""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from test_report import ENVIRONMENT, everything, made, measured

from vidbench.records import Measurement, Memory
from vidbench.report import report
from vidbench.sweep import Point

if TYPE_CHECKING:
    from playwright.sync_api import Browser, CDPSession, Page

MANY = 10_000
LIMIT_S = 3.0
"""Of the page's own thread, which stands for seconds on an idle machine and does not grow with what else runs."""

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None and os.environ.get("CI") != "true":
        pytest.skip(f"needs a browser: one of {', '.join(BROWSERS)} (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--enable-unsafe-swiftshader"]
        found = playwright.chromium.launch(executable_path=executable, args=flags)
        yield found
        found.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report([made(everything())], tmp_path_factory.mktemp("page"))


@pytest.fixture
def page(browser: Browser, written: Path) -> Iterator[Page]:
    yield from opened(browser, written)


def opened(browser: Browser, path: Path, **options: Any) -> Iterator[Page]:
    """The page at `path`, as `empty` has it."""
    for found in empty(browser, **options):
        found.goto(path.as_uri())
        yield found


def empty(browser: Browser, **options: Any) -> Iterator[Page]:
    """A page with no network; whatever it says on the console, or asks of another place, fails the test."""
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 900}, **options)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    said: list[str] = []
    found = context.new_page()
    found.on("console", lambda message: said.append(message.text) if _is_complaint(message) else None)
    found.on("pageerror", lambda error: said.append(str(error)))
    found.on("request", lambda request: said.append(request.url) if not _is_own(request.url) else None)
    yield found
    context.close()
    assert not said


def _is_complaint(message: Any) -> bool:
    """Whether the page is to blame: what software that stands in for a GPU says of its speed is not."""
    return message.type in ("error", "warning") and "GL Driver Message" not in message.text


def _is_own(url: str) -> bool:
    return url.startswith(("file:", "data:", "blob:"))


def rows(page: Page) -> list[str]:
    return page.locator("#table tbody tr:not(.detail)").all_inner_texts()


def count(page: Page) -> str:
    return page.locator("#count").inner_text()


def marks(page: Page) -> int:
    """Points that the explorer has drawn."""
    return int(
        page.evaluate("document.getElementById('plot').data.reduce((n, t) => n + (t.customdata || []).length, 0)")
    )


def tick(page: Page, facet: str, value: str) -> None:
    box = page.locator("details.facet", has=page.locator("summary span", has_text=facet)).first
    if box.get_attribute("open") != "":
        box.locator("summary").click()
    box.locator("label", has_text=value).first.locator("input").check()


def test_a_filter_goes_for_table_and_explorer(page: Page) -> None:
    before = marks(page)
    page.fill("#filter", "c3d compiled clip_length=16")
    page.wait_for_function("document.getElementById('count').textContent.includes(' of ')")
    assert rows(page)
    assert all("c3d" in row and "compiled" in row for row in rows(page))
    assert 0 < marks(page) <= len(rows(page)) < before
    page.fill("#filter", "nothing is called so")
    page.wait_for_function("document.getElementById('count').textContent.startsWith('0 of')")
    assert (rows(page), marks(page)) == ([], 0)


def test_ticks_narrow_to_any_of_a_column_and_all_of_several(page: Page) -> None:
    tick(page, "workload", "c3d")
    tick(page, "workload", "x3d_s")
    tick(page, "batch size", "4")
    names = {row.split("\t")[0] for row in rows(page)}
    assert names == {"c3d", "x3d_s"}
    page.keyboard.press("Escape")
    assert page.locator("details.facet[open]").count() == 0
    assert "2 of" in page.locator("details.facet.chosen summary").first.inner_text()


def test_a_head_sorts_and_sorts_back_by_mouse_and_by_key(page: Page) -> None:
    page.select_option("#explore-y", "peak_memory_bytes")
    head = page.locator("#table th", has_text="latency").first
    place = page.locator("#table th").all_inner_texts().index(head.inner_text())

    def latencies() -> list[float]:
        cells = [row.split("\t")[place].replace(",", "") for row in rows(page)]
        return [float(one) for one in cells if one != "–"]

    head.click()
    assert len(latencies()) > 5
    assert latencies() == sorted(latencies())
    head.press("Enter")
    assert latencies() == sorted(latencies(), reverse=True)


def test_pointing_at_a_mark_tells_its_interval_and_a_click_how_to_profile_it(page: Page) -> None:
    page.locator("#plot").scroll_into_view_if_needed()
    at = page.evaluate(
        """() => { const box = document.querySelector('#plot .scatterlayer .points path').getBoundingClientRect();
                   return [box.x + box.width / 2, box.y + box.height / 2]; }"""
    )
    tip = page.locator(".tip")
    for _ in range(50):  # Plotly looks at some of the movements only, fewer on a busy machine
        page.mouse.move(at[0] - 40, at[1] - 40)
        page.mouse.move(*at, steps=4)
        page.wait_for_timeout(100)
        if tip.is_visible():
            break
    assert "95 % interval" in tip.inner_text()
    assert "trust:" in tip.inner_text()
    page.mouse.down()
    page.mouse.up()
    page.locator("#picked p").first.wait_for()
    assert "vidbench profile '" in page.locator("#picked").inner_text()


def test_the_frontier_is_of_points_that_none_beats(page: Page) -> None:
    page.select_option("#explore-x", "latency_s")
    page.select_option("#explore-y", "peak_memory_bytes")
    points, line = page.evaluate(
        """() => { const data = document.getElementById('plot').data;
                   const marks = data.filter(t => t.mode === 'markers');
                   const frontier = data.find(t => t.name === 'frontier');
                   const pairs = trace => trace.x.map((x, i) => [x, trace.y[i]]);
                   return [marks.flatMap(pairs), pairs(frontier)]; }"""
    )
    assert line
    for x, y in line:
        assert not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)
    told = page.locator("#frontier li").count()
    assert told == min(12, len(line))


def test_what_is_shown_is_copied_and_saved(page: Page) -> None:
    page.fill("#filter", "lstm library")
    page.wait_for_function("document.getElementById('count').textContent.includes(' of ')")
    page.click("#copy")
    page.wait_for_function("document.getElementById('copy').textContent.includes('copied')")
    copied = list(csv.DictReader(io.StringIO(page.evaluate("navigator.clipboard.readText()"))))
    with page.expect_download() as download:
        page.click("#save")
    saved = list(csv.DictReader(Path(download.value.path()).read_text(encoding="utf-8").splitlines()))
    assert copied == saved
    assert f"{len(saved)} of" in count(page)
    assert {row["workload"] for row in saved} == {"lstm"}
    assert all(float(row["latency_s (ms)"]) > 0 for row in saved)


def test_a_row_unfolds_by_key(page: Page) -> None:
    first = page.locator("#table tbody tr").first
    first.focus()
    page.keyboard.press("Enter")
    assert "95 % interval of the latency" in page.locator("tr.detail").inner_text()
    first.focus()
    page.keyboard.press("Enter")
    assert page.locator("tr.detail").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_read_in_light_and_in_dark(browser: Browser, written: Path, scheme: Any) -> None:
    for page in opened(browser, written, color_scheme=scheme):
        ink, paper = page.evaluate(
            """() => { const of = getComputedStyle(document.body);
                       return [of.color, of.backgroundColor].map(c => c.match(/[0-9]+/g).map(Number)); }"""
        )
        axis = page.evaluate("getComputedStyle(document.querySelector('#plot .xtick text')).fill").removeprefix("rgb(")
        assert contrast(ink, paper) > 7
        assert contrast([int(part) for part in axis.rstrip(")").split(",")], paper) > 4.5
        assert (sum(paper) < 200) == (scheme == "dark")


def contrast(first: list[int], second: list[int]) -> float:
    """Of two colours. Source: WCAG 2.2, success criterion 1.4.3."""

    def luminance(colour: list[int]) -> float:
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in colour[:3])]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_on_paper_it_is_light_and_has_no_controls(browser: Browser, written: Path) -> None:
    for page in opened(browser, written, color_scheme="dark"):
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert not page.locator("#filter").is_visible()
        assert not page.locator("nav").is_visible()
        assert page.locator("#frontier").is_visible()
        assert len(page.pdf()) > 50_000


def many() -> Iterator[Measurement]:
    for number in range(MANY):
        case = {"clip_length": 8 << number % 4, "batch_size": 1 + number % 5, "hidden_size": 16 + number}
        point = Point("lstm" if number % 2 else "rnn", "op", ("library", "compiled")[number % 3 % 2], case=case)
        yield from measured(point, 1e-4 * (1 + number % 97), rounds=1, memory=Memory(10**6, 10**6 + 977 * number))


def test_ten_thousand_points_are_there_within_seconds_and_follow_a_filter(browser: Browser, tmp_path: Path) -> None:
    path = report([made(many())], tmp_path)
    for page in empty(browser):
        session = page.context.new_cdp_session(page)
        session.send("Performance.enable", {"timeDomain": "threadTicks"})

        def busy_s(session: CDPSession = session) -> float:
            found = session.send("Performance.getMetrics")["metrics"]
            return float(next(metric["value"] for metric in found if metric["name"] == "TaskDuration"))

        page.goto(path.as_uri())
        page.locator("#table tbody tr").first.wait_for()
        page.wait_for_function("document.getElementById('plot').data !== undefined")
        assert marks(page) == MANY
        opened_s = busy_s()
        assert 0.1 < opened_s < LIMIT_S
        page.fill("#filter", "rnn clip_length=32")
        page.wait_for_function("document.getElementById('count').textContent.includes(' of ')")
        assert 0 < marks(page) < MANY
        assert busy_s() - opened_s < LIMIT_S / 2


def test_runs_beside_one_another_are_marked_where_they_differ(browser: Browser, tmp_path: Path) -> None:
    point = Point("conv3d", "op", "library", case={"clip_length": 8, "batch_size": 1})
    same = replace(point, workload="conv2plus1d")
    runs = [
        replace(
            made([*measured(point, latency), *measured(same, 1e-3)], name),
            environment=replace(ENVIRONMENT, torch=torch),
        )
        for name, latency, torch in (("20260101T000000Z-a", 1e-3, "2.11.0"), ("20260102T000000Z-b", 2e-3, "2.13.0"))
    ]
    for page in opened(browser, report(runs, tmp_path)):
        lines = page.locator("#beside tbody tr").all_inner_texts()
        assert all(text in lines[0] for text in ("conv3d", "▲", "×)"))
        assert "▲" not in lines[1]
        assert page.locator(".differs dt").all_inner_texts().count("torch") == 2
