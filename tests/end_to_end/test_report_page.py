"""The report in a real browser: narrow and wide, light and dark, with hostile strings inside."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quantize.report.page.html import Subject, render_report
from tests.end_to_end.browser import Browser, NoBrowser, Tab, find_chromium, tab

sys.path.append(str(Path(__file__).resolve().parents[1] / "unit"))
import report_fixture as fixture

pytestmark = pytest.mark.end_to_end

# Every element that reaches over the right edge, unless something around it scrolls or cuts.
OVERFLOWING = """
(() => {
  const width = document.documentElement.clientWidth, found = [];
  const inside = e => { for (let p = e.parentElement; p; p = p.parentElement)
    if (["auto", "scroll", "hidden"].includes(getComputedStyle(p).overflowX)) return true; };
  for (const e of document.body.querySelectorAll("*")) {
    const box = e.getBoundingClientRect();
    if (box.width && box.right > width + 1 && !inside(e) && !e.matches(".skip"))
      found.push(e.tagName + "." + e.getAttribute("class") + " " + Math.round(box.right));
  }
  return [document.documentElement.scrollWidth - width, found];
})()
"""
TROUBLE = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    try:
        chromium = find_chromium()
    except NoBrowser as reason:
        pytest.skip(str(reason))
    found = Browser(chromium, tmp_path_factory.mktemp("browser"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    subject = Subject("m", fixture.card(), fixture.details(), "", "record.json")  # type: ignore[arg-type]
    path = tmp_path_factory.mktemp("pages") / "report.html"
    path.write_text(render_report([subject]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records = (fixture.card(), fixture.worse_card(), fixture.better_card())
    subjects = [Subject(record["recipe"]["name"], record, None) for record in records]
    path = tmp_path_factory.mktemp("pages") / "comparison.html"
    path.write_text(render_report(subjects), encoding="utf-8")
    return path


def open_all(opened: Tab) -> None:
    opened.value("document.querySelectorAll('details').forEach(d => d.open = true)")


@pytest.mark.parametrize("width", [320, 360, 768, 1000, 1400, 2200])
@pytest.mark.parametrize("name", ["page", "comparison"])
def test_no_page_scrolls_sideways(
    browser: Browser, request: pytest.FixtureRequest, name: str, width: int
) -> None:
    with tab(browser, request.getfixturevalue(name)) as opened:
        open_all(opened)
        opened.resize(width)
        assert opened.value("innerWidth") == width
        assert opened.value(OVERFLOWING) == [0, []]


def test_overflow_is_seen_by_the_probe(browser: Browser, page: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide.html"
    wide.write_text(page.read_text().replace("<h1>", '<h1 style="width: 500px">'))
    with tab(browser, wide) as opened:
        opened.resize(360)
        over, found = opened.value(OVERFLOWING)
        assert over > 100 and found[0].startswith("H1")


@pytest.mark.parametrize("name", ["page", "comparison"])
def test_it_asks_for_nothing_and_complains_of_nothing(
    browser: Browser, request: pytest.FixtureRequest, name: str
) -> None:
    path = request.getfixturevalue(name)
    with tab(browser, path) as opened:
        open_all(opened)
        asked = [e["request"]["url"] for e in opened.happened("Network.requestWillBeSent")]
        assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
        assert opened.happened(*TROUBLE) == []
        assert opened.value("document.scripts.length") == 0


def test_requests_and_complaints_are_seen_by_the_probe(browser: Browser, tmp_path: Path) -> None:
    loud = tmp_path / "loud.html"
    loud.write_text(
        '<img src="http://127.0.0.1:9/x"><script>console.error("x"); nothing()</script>'
    )
    with tab(browser, loud) as opened:
        asked = [e["request"]["url"] for e in opened.happened("Network.requestWillBeSent")]
        assert "http://127.0.0.1:9/x" in asked
        assert len(opened.happened(*TROUBLE)) >= 2


@pytest.mark.parametrize("policy", [True, False])
def test_hostile_strings_are_inert(
    browser: Browser, page: Path, tmp_path: Path, policy: bool
) -> None:
    """Also without the page's own policy: nothing hostile becomes an element."""
    text = page.read_text(encoding="utf-8")
    if not policy:
        text, count = re.subn('<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
        assert count == 1
    path = tmp_path / "page.html"
    path.write_text(text, encoding="utf-8")
    with tab(browser, path) as opened:
        open_all(opened)
        assert opened.value("document.title") == "tiny-llama-awq: quantization report"
        assert (
            opened.value("document.querySelectorAll('img, script, [onload], [onerror]').length")
            == 0
        )
        for hostile in (fixture.XSS, fixture.BREAKOUT):
            assert opened.value(f"document.body.innerText.includes({json.dumps(hostile)})")
        assert opened.happened(*TROUBLE) == []


def test_a_hostile_page_is_seen_by_the_probe(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(f"<title>fine</title>{fixture.XSS}")
    with tab(browser, path) as opened:
        assert opened.value("document.title") == "owned"


def colours(opened: Tab) -> tuple[str, str, str]:
    read = "(s, p) => getComputedStyle(document.querySelector(s))[p]"
    found = [
        opened.value(f"({read})({selector!r}, {name!r})")
        for selector, name in (
            ("body", "backgroundColor"),
            ("body", "color"),
            (".strip .interval", "stroke"),
        )
    ]
    return found[0], found[1], found[2]


def brightness(colour: str) -> float:
    red, green, blue = map(int, re.findall(r"\d+", colour)[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_light_and_dark_follow_the_reader(browser: Browser, page: Path) -> None:
    with tab(browser, page, prefers_color_scheme="light") as opened:
        light = colours(opened)
        opened.media(prefers_color_scheme="dark")
        dark = colours(opened)
    assert brightness(light[0]) > 230 > 60 > brightness(light[1])
    assert brightness(dark[0]) < 60 < 200 < brightness(dark[1])
    assert brightness(dark[2]) > brightness(light[2]), "marks of the pictures follow, too"


def test_every_figure_is_shown(browser: Browser, page: Path) -> None:
    """Each number of the comparison stands in an element that has a size on the page."""
    shown = """[...document.querySelectorAll('data')]
      .filter(d => d.getClientRects().length).map(d => Number(d.value))"""
    with tab(browser, page) as opened:
        open_all(opened)
        for width in (360, 1400):
            opened.resize(width)
            values = set(opened.value(shown))
            assert [n for n in numbers(fixture.compare()) if n not in values] == []


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for item in value.values():
            yield from numbers(item)
    elif isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def visible(opened: Tab, selector: str) -> int:
    counted: int = opened.value(
        f"[...document.querySelectorAll({selector!r})]"
        ".filter(e => e.getClientRects().length).length"
    )
    return counted


def test_flips_are_filtered_without_a_script(browser: Browser, page: Path) -> None:
    flips = fixture.details()["flips"]
    count: Callable[[str, bool], int] = lambda task, lost: sum(  # noqa: E731
        (flip["candidate_score"] < flip["baseline_score"]) == lost for flip in flips[task]
    )
    with tab(browser, page) as opened:
        assert visible(opened, "#flips details") == sum(map(len, flips.values()))
        opened.value("document.getElementById('only-lost').click()")
        assert visible(opened, "#flips details") == sum(count(task, True) for task in flips)
        opened.value("document.getElementById('flips-of-2').click()")
        assert visible(opened, "#flips details") == count("valley_qa", True)
        opened.value("document.getElementById('only-gained').click()")
        assert visible(opened, "#flips details") == count("valley_qa", False)


def test_a_flip_is_read_side_by_side(browser: Browser, page: Path) -> None:
    place = """(side => { const boxes = document.querySelectorAll('#flips details .' + side);
      const box = boxes[0].getBoundingClientRect(); return [box.left, box.top]; })"""
    with tab(browser, page) as opened:
        opened.resize(1400)
        (left, top), (right, other) = (
            opened.value(f"{place}('{s}')") for s in ("baseline", "candidate")
        )
        assert right > left + 200 and top == other
        opened.resize(360)
        (left, top), (right, other) = (
            opened.value(f"{place}('{s}')") for s in ("baseline", "candidate")
        )
        assert right == left and other > top
        text = opened.value("document.querySelector('#flips').innerText")
        assert "“pony” → “hen”" in text and "2: from a pedlar" in text


def test_the_keyboard_reaches_what_scrolls(browser: Browser, page: Path) -> None:
    with tab(browser, page) as opened:
        opened.resize(360)
        unreached = opened.value(
            """[...document.querySelectorAll('*')].filter(e =>
              e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0 &&
              ['auto', 'scroll'].includes(getComputedStyle(e).overflowX) && e.tabIndex < 0)
              .map(e => e.outerHTML.slice(0, 80))"""
        )
        assert unreached == []
