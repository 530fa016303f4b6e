"""Pages in a real browser: nothing on the console, nothing wider than a phone, and pictures for people to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.report.test_report import hostile

from fedloom.report import write_overlay, write_report

WIDE = "() => Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"
SMALL = """() => [...document.querySelectorAll('figure > svg text')].filter(
  one => one.getBoundingClientRect().height < 9).length"""
OUT = """() => [...document.querySelectorAll('figure > svg text')].filter(one => {
  const box = one.getBoundingClientRect(); return box.left < 0 || box.right > innerWidth }).length"""


def look(browser: Any, page: Path, picture: Path, width: int, scheme: str = "light") -> Any:
    """Open a page; return it, and fail on whatever the console says or a dialog that opens."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    tab = context.new_page()
    said: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("dialog", lambda dialog: (said.append("dialog"), dialog.dismiss()))
    tab.on("request", lambda request: said.append(request.url) if not request.url.startswith("file:") else None)
    tab.goto(page.resolve().as_uri())
    tab.screenshot(path=str(picture), full_page=True)
    assert said == [] and picture.stat().st_size > 20_000
    return tab


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (1280, "light"), (1280, "dark")])
def test_a_page_fits_every_screen(browser: Any, compared: Path, tmp_path: Path, width: int, scheme: str) -> None:
    page = write_report(compared, tmp_path / "page.html")
    tab = look(browser, page, tmp_path / "page.png", width, scheme)
    assert tab.evaluate(WIDE) <= width
    assert tab.evaluate(SMALL) == 0 and tab.evaluate(OUT) == 0
    tab.evaluate("() => document.querySelectorAll('details').forEach(one => { one.open = true })")
    assert tab.evaluate(WIDE) <= width
    tab.context.close()


def test_dark_is_dark_and_print_is_white(browser: Any, compared: Path, tmp_path: Path) -> None:
    page = write_report(compared, tmp_path / "page.html")
    tab = look(browser, page, tmp_path / "page.png", 1280, "dark")
    colour = "() => getComputedStyle(document.body).backgroundColor"
    assert max(map(int, tab.evaluate(colour)[4:-1].split(","))) < 60
    tab.emulate_media(media="print")
    assert tab.evaluate(colour) == "rgb(255, 255, 255)"
    assert len(tab.pdf()) > 10_000
    tab.context.close()


def test_hostile_texts_stay_texts(browser: Any, compared: Path, tmp_path: Path) -> None:
    page = write_report(hostile(compared, tmp_path), tmp_path / "page.html")
    tab = look(browser, page, tmp_path / "page.png", 360)
    assert tab.evaluate("() => document.querySelectorAll('script, img, b, i').length") == 0
    assert tab.evaluate(WIDE) <= 360
    tab.context.close()


def test_several_runs_fit_a_phone(browser: Any, compared: Path, other: Path, tmp_path: Path) -> None:
    page, _ = write_overlay([compared, other], tmp_path / "both.html")
    tab = look(browser, page, tmp_path / "both.png", 360)
    assert tab.evaluate(WIDE) <= 360
    tab.context.close()
