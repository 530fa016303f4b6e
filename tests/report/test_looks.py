"""Pages in a real browser: nothing on the console, nothing wider than a phone, and pictures for people to look at."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.helpers import tree
from tests.report.conftest import EVALUATE
from tests.report.test_report import Outline, hostile

from fedloom.bench import Outcome, grid, run_all, tabulate, write_page
from fedloom.report import write_overlay, write_report
from fedloom.tracking import Sink

ROW = r'<tr><th scope="row">(.*?)</th>(.*?)</tr>'
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


@pytest.fixture(scope="module")
def benched(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    """Two variations at two seeds, and two cells that are refused."""
    folder = tmp_path_factory.mktemp("bench")
    recipe = folder / "small.yaml"
    recipe.write_text(yaml.safe_dump(tree(tiny, evaluate=EVALUATE, compare=["local"], rounds=1)))
    cells = grid([str(recipe)], [], ["algorithm=fedavg,fedprox,scaffold"], [0, 1], folder / "out")
    return run_all(cells, [], lambda cell: Sink(), lambda outcome: None)


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("count", [1, 6])
def test_a_bench_of_one_run_and_of_many_fits_every_screen(
    browser: Any, benched: list[Outcome], tmp_path: Path, count: int, width: int
) -> None:
    page = write_page(tabulate(benched[:count]), benched[:count], "fedloom bench <small>", tmp_path)
    tab = look(browser, page, tmp_path / "page.png", width)
    assert tab.evaluate(WIDE) <= width
    assert tab.evaluate(SMALL) == 0 and tab.evaluate(OUT) == 0
    tab.evaluate("() => document.querySelectorAll('details').forEach(one => { one.open = true })")
    assert tab.evaluate(WIDE) <= width
    tab.emulate_media(media="print")
    tab.set_viewport_size({"width": 718, "height": 1000})  # A4 less its margins
    assert tab.evaluate(WIDE) <= 718
    assert len(tab.pdf()) > 10_000
    tab.context.close()


def test_the_page_of_a_bench_says_what_its_tables_say(benched: list[Outcome], tmp_path: Path) -> None:
    found = tabulate(benched)
    text = write_page(found, benched, "fedloom bench <small> --seeds 0,1", tmp_path).read_text()
    outline = Outline(text)
    assert outline.open == [] and outline.nameless == 0 and len(set(outline.ids)) == len(outline.ids)
    assert outline.ids[:2] == ["bench", "bench-title"]
    rows: dict[str, set[str]] = {}
    for head, cells in re.findall(ROW, text):
        rows.setdefault(head, set()).update(re.findall("<td>(.*?)</td>", cells))
    for cells in found.cells():
        assert set(filter(None, cells[3:])) <= rows[", ".join(cells[:3])]
    assert "small: fedprox against fedavg" in rows and "small, fedavg: federated against local" in rows
    assert "4 of 6" in text and "2 runs have no result" in text and "sgd_exact holds for plain SGD only" in text
    assert "fedloom bench &lt;small&gt; --seeds 0,1" in text
    assert ">nan<" not in text and ">None<" not in text
